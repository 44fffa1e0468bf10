"""The peak memory of real training steps beside the estimate of `qlora estimate`.

    python benchmarks/bench_memory.py --check

Each case is two optimizer steps of `qlora finetune`'s own trainer on a model with random weights, in a shape of a
known family with fewer layers. "measured" is `torch.cuda.max_memory_allocated`; "reserved" is what torch's allocator
held, and "process" what the GPU had in use when the case ended, the CUDA context included. --check fails where the
estimate is more than 7% off. Needs a GPU.
"""

import dataclasses
import gc
import sys
import tempfile

import harness
import torch

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
QWEN_1B = {
    "model_type": "qwen3",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
BOUND = 0.07


@dataclasses.dataclass(frozen=True)
class Case:
    """A model's shape, its layers, and options of the run."""

    name: str
    shape: dict
    layers: int
    options: dict


CASES = [
    Case("8B, 8 layers, 2x2048, recomputed", LLAMA_8B, 8, {"batch_size": 2, "max_length": 2048}),
    Case("8B, 4 layers, 1x512, recomputed", LLAMA_8B, 4, {"batch_size": 1, "max_length": 512}),
    Case(
        "8B, 4 layers, 2x1024, kept",
        LLAMA_8B,
        4,
        {"batch_size": 2, "max_length": 1024, "gradient_checkpointing": "none"},
    ),
    Case(
        "8B, 4 layers, 4x2048, recomputed, inputs in host memory",
        LLAMA_8B,
        4,
        {"batch_size": 4, "max_length": 2048, "offload_activations": True},
    ),
    Case(
        "8B, 4 layers, 1x2048, r=64, 8-bit state, 2 passes",
        LLAMA_8B,
        4,
        {"batch_size": 1, "max_length": 2048, "r": 64, "optimizer": "paged_adamw_8bit", "grad_accum": 2},
    ),
    Case(
        "8B, 4 layers, 2x2048, r=64, state in host memory",
        LLAMA_8B,
        4,
        {"batch_size": 2, "max_length": 2048, "r": 64, "optimizer_gpu_gib": 0.0},
    ),
    Case(
        "Qwen3 1.7B, 8 layers, 4x1024, q and v, kept",
        QWEN_1B,
        8,
        {
            "batch_size": 4,
            "max_length": 1024,
            "target_modules": ["q_proj", "v_proj"],
            "gradient_checkpointing": "none",
        },
    ),
    Case(
        "Qwen3 1.7B, 8 layers, 8x1024, recomputed, torch AdamW",
        QWEN_1B,
        8,
        {"batch_size": 8, "max_length": 1024, "optimizer": "adamw_fused"},
    ),
]


def tokenizer_of(words: int):
    """A tokenizer of a few words, each one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<eos>": 0, "<pad>": 1} | {f"w{i}": 2 + i for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def empty_model(case: Case):
    """The case's model in bfloat16 with its parameters on the meta device."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"model_type": "llama", **case.shape}
    config = AutoConfig.for_model(**shape, num_hidden_layers=case.layers, dtype="bfloat16")
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def fill(model: torch.nn.Module, device: str) -> torch.nn.Module:
    """Random weights for a model on the meta device; parameters that are shared stay so."""
    filled = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in filled:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                values = values.fill_(1.0) if parameter.dim() == 1 else values.normal_(std=0.02)
                filled[id(parameter)] = torch.nn.Parameter(values, requires_grad=False)
            if parameter is not None:
                module._parameters[name] = filled[id(parameter)]
    return model.to(device)


def measure(case: Case, device: str) -> dict:
    """A row: bytes of the estimate and of two optimizer steps."""
    import qlora_engine as qe
    from qlora_engine.training import estimator
    from qlora_engine.training.architecture import architecture_of
    from qlora_engine.training.data import Rows
    from qlora_engine.training.options import FinetuneOptions
    from qlora_engine.training.recipe import build_trainer

    settings = {"optimizer": "paged_adamw", "gradient_checkpointing": "selective", **case.options}
    with tempfile.TemporaryDirectory() as folder:
        if device == "cuda":  # what an earlier case left is not this one's
            gc.collect()
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        options = FinetuneOptions(model=case.name, data="none", output=folder, max_steps=2, **settings).check()
        config = qe.QLoRAConfig(r=options.r, target_modules=options.target_modules)
        model = empty_model(case)
        found = estimator.estimate(architecture_of(model, config), options)
        model = qe.prepare(fill(model, device), config)
        rows = 2 * options.batch_size * options.grad_accum
        words = options.max_length - 1  # and an end token
        texts = [{"text": " ".join(f"w{(i + j) % 64}" for j in range(words))} for i in range(rows)]
        on = torch.device(device)
        dtype = torch.bfloat16
        trainer = build_trainer(options, model, tokenizer_of(64), Rows("text", texts, case.name), None, on, dtype)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    row = {"case": case.name, "estimate": found.allocated, "total": found.total}
    if device == "cuda":
        free, whole = torch.cuda.mem_get_info()
        row |= {
            "measured": torch.cuda.max_memory_allocated() - before,
            "reserved": torch.cuda.max_memory_reserved(),
            "process": whole - free,
            "left_by_others": before,
        }
        row |= {"error": row["estimate"] / row["measured"] - 1, "parts": dict(found.rows())}
    return row


def main() -> int:
    options = harness.parser(__doc__).parse_args()
    harness.require_compiled(["linear_nf4"], options.device)
    if options.device != "cuda":
        raise SystemExit("the peak of a GPU's memory cannot be measured on a CPU; this needs --device cuda")
    rows = []
    for case in CASES[:3] if options.quick else CASES:
        rows.append(measure(case, options.device))
        print(harness.table(shown(rows[-1:]), COLUMNS), flush=True)
        harness.write_json(options.out / f"bench_memory_{harness.slug(options.device)}.json", options.device, rows)
    print("\nGiB\n" + harness.table(shown(rows), COLUMNS))
    wrong = [row["case"] for row in rows if abs(row["error"]) > BOUND]
    if options.check and wrong:
        print(f"more than {BOUND:.0%} off: {'; '.join(wrong)}")
        return 1
    return 0


COLUMNS = {
    "case": "case",
    "estimate": "estimate",
    "measured": "measured",
    "error": "error %",
    "reserved": "reserved",
    "total": "estimate in all",
    "process": "process",
}


def shown(rows: list[dict]) -> list[dict]:
    """The rows in GiB."""
    names = ("estimate", "measured", "reserved", "total", "process")
    return [
        {"case": row["case"], "error": 100 * row["error"], **{name: row[name] / 2**30 for name in names}}
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
