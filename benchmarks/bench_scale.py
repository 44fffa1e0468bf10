"""Large models and long sequences on one GPU: 70B within 48 GiB, 123B and 8B at 32k tokens within 80 GB.

    python benchmarks/bench_scale.py
    python benchmarks/bench_scale.py --only 70B --cap-gib 48

Whole training steps, with rank-16 adapters on every linear layer: forward, backward, PagedAdamW. The 4-bit weights
are drawn as bytes, so no 16-bit weight exists at any time; shapes are those of Llama-3-70B, Mistral-Large and
Llama-3-8B. Layers are recomputed, their inputs wait in pinned host memory, logits exist in chunks, and the
optimizer's state lies in host memory. The last
length of 70B is the longest found to fit, in steps of 512 tokens: the line through the last two peaks is extended to
the cap, and what it says is run. A length's first step, which the first length alone has before its timed one, also
takes page-locked memory from the system. torch may
take the cap less CONTEXT_GIB, which is for what the driver and the libraries take beside it.
"""

import gc
import math
import sys
import time
from dataclasses import dataclass

import harness
import torch
from torch import nn

import qlora_engine as qe
from qlora_engine.models.prepare import replace_module
from qlora_engine.nn import NF4Linear
from qlora_engine.optim import PagedAdamW
from qlora_engine.quantization.codebook import NESTED_BLOCKSIZE, blocks_of
from qlora_engine.quantization.weight import NF4Weight
from qlora_engine.training.activations import recompute_layers
from qlora_engine.training.loss import causal_lm_loss

GIB = 2**30
CONTEXT_GIB = 1.5
RANK, BLOCKSIZE = 16, 64
STD = 0.02
NF4_RMS = 0.55  # of the 16 levels, each as likely
STEP_TOKENS = 512


@dataclass(frozen=True)
class Shapes:
    """A decoder's sizes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int


MODELS = {
    "70B": Shapes(80, 8192, 28672, 64, 8, 128256),
    "123B": Shapes(88, 12288, 28672, 96, 8, 32768),
    "8B": Shapes(32, 4096, 14336, 32, 8, 128256),
    "tiny": Shapes(3, 128, 256, 4, 2, 512),
}


@dataclass(frozen=True)
class Work:
    """What is measured of a model.

    Attributes:
        model: key of MODELS.
        cap_gib: memory that it has, or None, on a CPU.
        tokens: lengths of the one sequence of a step.
        longest: whether the longest that fits is looked for besides, from the last two lengths.
    """

    model: str
    cap_gib: float | None
    tokens: tuple[int, ...]
    longest: bool = False


def work_of(args) -> list[Work]:
    """What the options ask for."""
    if args.device == "cpu":
        return [Work("tiny", None, (64, 128))]
    found = [
        Work("8B", args.card_gib, (32768,)),
        Work("70B", args.cap_gib, (512, 2048, 4096), longest=True),
        Work("123B", args.card_gib, (512, 4096)),
    ]
    return [work for work in found if args.only in (None, work.model)]


def random_weight(shape: tuple[int, int], device: str) -> NF4Weight:
    """Random bytes as a double-quantized weight of about STD."""
    blocks = blocks_of(math.prod(shape), BLOCKSIZE)

    def bytes_(count):
        return torch.randint(256, (count,), dtype=torch.uint8, device=device)

    offset = torch.tensor(STD / NF4_RMS, device=device)
    nested = torch.full((blocks_of(blocks, NESTED_BLOCKSIZE),), 0.2 * STD, device=device)
    packed = bytes_(math.ceil(math.prod(shape) / 2))
    return NF4Weight(packed, bytes_(blocks), nested, offset, shape, BLOCKSIZE, torch.bfloat16)


def configuration(shapes: Shapes, longest: int):
    """transformers' description of a decoder of these sizes."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shapes.vocabulary,
        hidden_size=shapes.hidden,
        intermediate_size=shapes.intermediate,
        num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.heads,
        num_key_value_heads=shapes.kv_heads,
        max_position_embeddings=longest,
        tie_word_embeddings=False,
        use_cache=False,
        dtype=torch.bfloat16,
    )


def fill_rest(model: nn.Module, device: str) -> None:
    """Gives norms, embeddings and head, which are on the meta device, numbers in bfloat16."""
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.weight = nn.Parameter(torch.ones(module.weight.shape, dtype=torch.bfloat16, device=device))
    for module in (model.model.embed_tokens, model.lm_head):
        drawn = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=device).normal_(std=STD)
        module.weight = nn.Parameter(drawn)


def build(shapes: Shapes, device: str, longest: int) -> nn.Module:
    """A model with adapters, born in 4 bits on the device."""
    from accelerate import init_empty_weights
    from transformers import LlamaForCausalLM

    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(configuration(shapes, longest))
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            replace_module(model, path, NF4Linear.from_weight(random_weight(tuple(module.weight.shape), device)), {})
    fill_rest(model, device)
    return qe.prepare(model.to(device), qe.QLoRAConfig(r=RANK, alpha=RANK)).train()


class Trainer:
    """Steps of one model, and what each took."""

    def __init__(self, work: Work, device: str):
        self.work, self.device, self.shapes = work, device, MODELS[work.model]
        began = time.perf_counter()
        self.model = build(self.shapes, device, 1 << 17)
        recompute_layers(self.model, "full", offload=device == "cuda")
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        budget = {"device_budget": 0} if device == "cuda" else {}
        self.optimizer = PagedAdamW(self.params, lr=1e-4, **budget)
        self.built = time.perf_counter() - began
        self.weights = sum(m.nf4_weight.nbytes for m in self.model.modules() if isinstance(m, NF4Linear))

    def __call__(self, tokens: int, warm: bool) -> dict:
        """One row: a step of one sequence; where `warm`, after one that is not timed."""
        ids = torch.randint(self.shapes.vocabulary, (1, tokens), device=self.device)
        for _ in range(1 + warm):
            self._synchronize()
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            loss = causal_lm_loss(self.model, ids, ids).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._synchronize()
            seconds = time.perf_counter() - began
        row = {
            "model": self.work.model,
            "cap_gib": self.work.cap_gib,
            "tokens": tokens,
            "loss": float(loss.detach()),
            "gradient_norm": float(self.optimizer.last_grad_norm),
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "weights_gib": self.weights / GIB,
            "adapter_parameters": sum(p.numel() for p in self.params),
            "state_on_host_gib": self.optimizer.host_bytes / GIB,
        }
        if self.device == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            row["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
            row["tflops"] = self._flops(tokens) / seconds / 1e12
        return row

    def _flops(self, tokens: int) -> float:
        """Operations of a step: each 4-bit product three times (forward, recomputation, dX), attention, head."""
        s = self.shapes
        head_size = s.hidden // s.heads
        linear = s.layers * (2 * s.hidden**2 + 2 * s.hidden * s.kv_heads * head_size + 3 * s.hidden * s.intermediate)
        attention = s.layers * 2 * tokens * s.hidden  # causal: half of the scores
        # attention's backward makes five products where its forward makes two
        return tokens * (2 * 3 * linear + 4.5 * attention + 2 * 2 * s.hidden * s.vocabulary)

    def _synchronize(self):
        if self.device == "cuda":
            torch.cuda.synchronize()


def limit(gib: float | None) -> float:
    """Lets torch take a part of the card; returns the GiB."""
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    allowed = min(total, gib or total) - CONTEXT_GIB
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    return allowed


def longest_that_fits(trainer: Trainer, rows: list[dict], allowed: float, tries: int = 4) -> dict | None:
    """The row of the longest sequence found to fit; None where nothing longer than the rows' does.

    The line through the last two peaks is extended to what torch may take, as often as that finds something longer.
    """
    found, points = None, [(row["tokens"], row["reserved_gib"]) for row in rows]
    for _ in range(tries):
        (t1, p1), (t2, p2) = points[-2:]
        tokens = int(t2 + (allowed - p2) / max((p2 - p1) / (t2 - t1), 1e-9)) // STEP_TOKENS * STEP_TOKENS
        if tokens <= t2:
            break
        try:
            found = trainer(tokens, warm=False) | {"longest": True}
            points.append((tokens, found["reserved_gib"]))
        except torch.OutOfMemoryError:
            print(f"{tokens} tokens do not fit", flush=True)
            trainer.optimizer.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()
            allowed -= 0.25 * (allowed - p2)  # nearer to the last that did
    return found


def measure(work: Work, device: str) -> list[dict]:
    """The rows of one model."""
    allowed = limit(work.cap_gib) if device == "cuda" else 0.0
    trainer = Trainer(work, device)
    rows = []
    for i, tokens in enumerate(work.tokens):
        rows.append(trainer(tokens, warm=i == 0) | {"built_s": trainer.built, "torch_may_take_gib": allowed})
        print({k: v if not isinstance(v, float) else round(v, 3) for k, v in rows[-1].items()}, flush=True)
    if work.longest:
        found = longest_that_fits(trainer, rows, allowed)
        if found:
            rows.append(found | {"built_s": trainer.built, "torch_may_take_gib": allowed})
    trainer.optimizer.close()
    return rows


def draw(rows: list[dict], title: str):
    """Peak memory by length, one line a model, and the caps."""

    def make(plt):
        fig, ax = plt.subplots(figsize=(7, 4.5))
        for model in dict.fromkeys(row["model"] for row in rows):
            own = [row for row in rows if row["model"] == model]
            (line,) = ax.plot([r["tokens"] for r in own], [r["peak_gib"] for r in own], "o-", label=f"{model} shapes")
            for row in own:
                text = f"{row['tokens_per_s']:,.0f} tok/s"
                ax.annotate(text, (row["tokens"], row["peak_gib"]), xytext=(4, 6), textcoords="offset points", size=7)
            if own[0]["cap_gib"]:
                label = f"{model}: torch may take {own[0]['torch_may_take_gib']:.1f} GiB"
                ax.axhline(own[0]["torch_may_take_gib"], color=line.get_color(), ls="--", lw=0.8, label=label)
        ax.set_xscale("log", base=2)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("tokens of the one sequence")
        ax.set_ylabel("peak GiB of tensors")
        ax.set_title(title, fontsize=9)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
        return fig

    return make


def main() -> int:
    p = harness.parser(*__doc__.split("\n\n", 1))
    p.add_argument("--only", choices=list(MODELS), help="one model alone")
    p.add_argument("--cap-gib", type=float, default=48.0, help="memory of the card that 70B is to fit")
    p.add_argument("--card-gib", type=float, default=80e9 / GIB, help="and that 123B and 8B are (default: 80 GB)")
    args = p.parse_args()
    if args.device == "cuda":
        harness.require_compiled(["linear_nf4", "linear_nf4_backward", "adamw_step"], args.device)
    rows = []
    name = args.out / f"bench_scale_{harness.slug(args.device)}"
    for work in work_of(args):
        try:
            rows += measure(work, args.device)
        except torch.OutOfMemoryError as error:
            print(f"{work.model}: out of memory: {str(error)[:200]}", flush=True)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        harness.write_json(name.with_suffix(".json"), args.device, rows)  # what there is, should time run out
    columns = {"model": "shapes", "cap_gib": "card GiB", "tokens": "tokens", "peak_gib": "peak GiB"}
    columns |= {"reserved_gib": "reserved", "seconds": "s a step", "tokens_per_s": "tok/s", "tflops": "TFLOP/s"}
    columns |= {"weights_gib": "4-bit GiB", "loss": "loss"}
    print(harness.table(rows, columns))
    if args.device == "cuda":
        title = f"QLoRA r={RANK} training steps, one sequence, {harness.environment(args.device)['device']}"
        harness.figure(name.with_suffix(".png"), draw(rows, title))
    bad = [row for row in rows if not math.isfinite(row["loss"]) or not 0 < row["gradient_norm"] < math.inf]
    if args.check:
        print(f"--check: {'losses and gradients are finite' if not bad else f'{len(bad)} ROWS ARE NOT FINITE'}")
    return bool(args.check and bad)


if __name__ == "__main__":
    sys.exit(main())
