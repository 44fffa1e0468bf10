"""The estimator against counted bytes: of a model's tensors, of an optimizer's state, of a step's activations."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import qlora_engine as qe
from qlora_engine.models.config import QLoRAConfig
from qlora_engine.nn.nf4_experts import NF4Experts
from qlora_engine.optim import PagedAdamW
from qlora_engine.training import activation_memory, estimator
from qlora_engine.training.architecture import architecture_of, read_architecture
from qlora_engine.training.errors import ModelError, UsageError
from qlora_engine.training.loss import SLICE_BYTES
from qlora_engine.training.memory import GIB
from qlora_engine.training.options import FinetuneOptions
from qlora_engine.training.sizes import model_sizes
from tests.training.live_bytes import LiveBytes

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "tie_word_embeddings": True,
}
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).bfloat16()


def qwen3(**changes):
    return Qwen3ForCausalLM(Qwen3Config(**{**SMALL, "head_dim": 32, **changes})).bfloat16()


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300)).bfloat16()


def options(**changes) -> FinetuneOptions:
    return FinetuneOptions(**{"model": "m", "data": "d", **changes}).check()


@pytest.fixture
def one_thread():
    """Many small operations wait for each other's threads longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def large():
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_8B))
    return architecture_of(model, QLoRAConfig())


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)).bfloat16()


@pytest.mark.parametrize("make", [llama, lambda: llama(tie_word_embeddings=False), qwen3, gpt2, mixtral])
@pytest.mark.parametrize("settings", [{"r": 4}, {"r": 4, "double_quant": False, "blocksize": 128}])
def test_weights_and_adapters_are_those_of_the_prepared_model(make, settings):
    model, config = make(), QLoRAConfig(**settings)
    found = estimator.estimate(architecture_of(model, config), options(r=4, dtype="bf16"))
    qe.prepare(model, config)
    adapters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    layers = [m for m in model.modules() if isinstance(m, qe.QLoRALinear)]
    packed = sum(layer.nf4_weight.nbytes for layer in layers)
    codes = sum(layer.weight.nbytes for layer in layers)
    for experts in (m for m in model.modules() if isinstance(m, NF4Experts)):
        own = [experts._parameters[name].nbytes for name in experts.projections]
        packed += sum(own) + sum(t.nbytes for t in experts._buffers.values() if t is not None)
        codes += sum(own)
    rest = sum(p.nbytes for p in model.parameters()) - adapters - codes
    assert (found.weights, found.rest, found.adapters) == (packed, rest, adapters)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", [{}, {"double_quant": False}])
def test_embeddings_and_head_in_four_bits(tied, settings):
    config = QLoRAConfig(r=4, quantize_embeddings=True, quantize_head=True, **settings)
    model = llama(tie_word_embeddings=tied)
    found = architecture_of(model, config)
    assert found.packed_head
    assert found.adapters == architecture_of(llama(tie_word_embeddings=tied), QLoRAConfig(r=4)).adapters
    qe.prepare(model, config)
    state = {name: t for name, t in model.state_dict().items() if "lora" not in name}
    rest = {name: tensor for name, tensor in state.items() if "norm" in name}
    assert found.quantized == sum(t.nbytes for t in state.values()) - sum(t.nbytes for t in rest.values())
    assert found.rest == sum(t.numel() for t in rest.values())
    sizes = model_sizes(model)
    assert sizes.bytes_4bit == found.quantized + 2 * found.rest
    assert sizes.parameters == found.parameters


def test_a_head_in_four_bits_is_never_decoded_whole(large):
    packed = dataclasses.replace(large, packed_head=True)
    step = activation_memory.Step(1, 8192)
    more = activation_memory.loss(packed, step) - activation_memory.loss(large, step)
    assert SLICE_BYTES < more < 0.1 * 2 * large.hidden * large.vocabulary
    trls = dataclasses.replace(step, own_loss=False)
    assert activation_memory.loss(packed, trls) - activation_memory.loss(large, trls) == 2 * 4096 * 128256


@pytest.mark.parametrize("bits", [32, 8])
def test_optimizer_state(bits):
    model = qe.prepare(llama(), QLoRAConfig(r=8))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = PagedAdamW(parameters, bits=bits)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    expected = estimator.optimizer_bytes(
        tuple(p.numel() for p in parameters), "paged_adamw" if bits == 32 else "paged_adamw_8bit"
    )
    # pages are aligned to 256 bytes
    assert expected <= optimizer.device_bytes <= expected + 256 * len(parameters)


def phi3():
    return Phi3ForCausalLM(Phi3Config(**SMALL, pad_token_id=0)).bfloat16()  # q, k, v in one projection


def gemma2():
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=32)).bfloat16()  # attention written out, norms behind


CASES = [
    (phi3, {}),
    (gemma2, {}),
    (llama, {}),
    (lambda: llama(intermediate_size=192), {}),
    (llama, {"target_modules": ["q_proj", "v_proj"]}),
    (qwen3, {}),
]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(("make", "settings"), CASES)
def test_activations_are_those_of_a_step(make, settings, recomputed, monkeypatch, one_thread):
    """Peak bytes of forward and backward of the layers, counted; the loss is a sum, which takes nothing."""
    model, config = make(), QLoRAConfig(r=2, **settings)
    shape = architecture_of(model, config)
    qe.prepare(model, config).train()
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 500, (2, 256))
    with LiveBytes() as live:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.model(ids).last_hidden_state.sum()
        loss.backward()
    step = activation_memory.Step(2, 256, recomputed=len(shape.layers) if recomputed else 0)
    # the final normalization alone
    monkeypatch.setattr(activation_memory, "loss", lambda model, step: 10 * step.tokens * model.hidden)
    assert activation_memory.peak(shape, step) == pytest.approx(live.peak, rel=0.07)


def test_what_each_layer_keeps_is_what_autograd_saves(one_thread):
    model, config = llama(), QLoRAConfig(r=4)
    layer = architecture_of(model, config).layers[0]
    qe.prepare(model, config).train()
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in known:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.model(torch.randint(0, 500, (2, 128)))
    saved = sum(t.untyped_storage().nbytes() for t in kept.values())
    # the first normalization's input needs no gradient and is not kept; the final one's is
    assert 4 * activation_memory.kept_by_layer(layer, activation_memory.Step(2, 128)) == pytest.approx(
        saved, rel=0.01
    )


def test_each_option_moves_its_own_part(large):
    base = options(r=16, batch_size=2, max_length=2048, liger="off")
    found = estimator.estimate(large, base)

    def changed(**values):
        return estimator.estimate(large, dataclasses.replace(base, **values))

    assert changed(optimizer="paged_adamw_8bit").optimizer == pytest.approx(found.optimizer / 4, rel=0.02)
    paged = changed(optimizer_gpu_gib=0.0)
    assert (paged.optimizer, paged.optimizer_host) == (0, found.optimizer)
    assert changed(optimizer_gpu_gib=0.1).optimizer == int(0.1 * GIB)
    assert changed(gradient_checkpointing="off").activations > 8 * found.activations
    assert changed(grad_accum=2).activations > found.activations
    assert changed(batch_size=4).activations == pytest.approx(2 * found.activations, rel=0.25)
    assert changed(packing=True).activations > found.activations  # a mask
    assert changed(liger="on").activations < found.activations
    assert changed(offload_activations=True).activations < found.activations
    assert changed(cuda_graphs=True).workspace > found.workspace
    assert changed(objective="dpo") == changed(batch_size=4)  # pairs
    halves = [estimator.estimate(large, base, recomputed=count).allocated for count in (0, 16, 31)]
    assert halves == sorted(halves, reverse=True)
    assert halves[-1] == found.allocated
    assert halves[0] == changed(gradient_checkpointing="none").allocated


def test_rows_add_up(large):
    found = estimator.estimate(large, options())
    assert sum(size for _, size in found.rows()) == found.total


def test_changes_lead_to_a_run_that_fits(large):
    run = options(batch_size=8, max_length=2048, gradient_checkpointing="off")
    turned = estimator.changes(large, run, 10 * GIB)
    assert turned[0].flags == "--gradient-checkpointing selective"
    assert [c.total for c in turned] == sorted((c.total for c in turned), reverse=True)
    assert turned[-1].total <= 10 * GIB < turned[-2].total
    assert "--batch-size 1" in turned[-1].flags or "--batch-size 2" in turned[-1].flags
    assert estimator.changes(large, run, 200 * GIB) == []
    assert estimator.changes(large, run, 2 * GIB)[-1].total > 2 * GIB


def test_largest_batch_is_the_last_that_fits(large):
    run, gpu = options(max_length=1024), 16 * GIB
    batch = estimator.largest_batch(large, run, gpu)
    totals = [estimator.estimate(large, dataclasses.replace(run, batch_size=b)).total for b in (batch, batch + 1)]
    assert totals[0] <= gpu < totals[1]
    assert estimator.largest_batch(large, run, GIB) == 0


def test_fewest_recomputed(large):
    run, gpu = options(batch_size=4, max_length=2048), 24 * GIB
    count = estimator.fewest_recomputed(large, run, gpu)
    assert 0 < count < 32
    assert estimator.estimate(large, run, recomputed=count).total <= gpu
    assert estimator.estimate(large, run, recomputed=count - 1).total > gpu
    assert estimator.fewest_recomputed(large, run, GIB) is None
    budget = estimator.activation_budget(large, run, count)
    assert estimator.step_of(large, dataclasses.replace(run, activation_gib=budget)).recomputed == count
    with pytest.raises(UsageError, match=r"the budget is 0\.5 GiB"):
        estimator.step_of(large, dataclasses.replace(run, activation_gib=0.5))


def test_configuration_alone_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL}))
    shape = read_architecture(str(tmp_path), QLoRAConfig())
    assert shape == read_architecture(str(tmp_path / "config.json"), QLoRAConfig())
    assert shape.name == "LlamaForCausalLM"
    assert len(shape.layers) == 4


def test_what_cannot_be_read_is_explained(tmp_path):
    with pytest.raises(ModelError, match=r"there is no config\.json at"):
        read_architecture(str(tmp_path), QLoRAConfig())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ModelError, match="is not known to this transformers"):
        read_architecture(str(tmp_path), QLoRAConfig())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL}))
    with pytest.raises(UsageError, match="matches no module"):
        read_architecture(str(tmp_path), QLoRAConfig(target_modules=["no_proj"]))


def test_out_of_memory_names_what_to_turn(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA_8B}))
    run = options(model=str(tmp_path), batch_size=16, max_length=4096)
    text = estimator.advice(run, 12 * GIB)
    assert "By estimate the run takes" in text
    assert "With --batch-size" in text
    assert "it fits, if nothing else" in estimator.advice(run, 400 * GIB)
    assert "too large even with" in estimator.advice(run, 2 * GIB)


MEASURED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("bench_finetune_*layers_h*.json"))


@pytest.mark.parametrize("file", MEASURED, ids=lambda file: file.stem)
def test_estimates_are_what_gpus_measured(file):
    """Every way of a step in the committed runs of `benchmarks/bench_finetune.py`, within 7%."""
    layers = int(re.search(r"(\d+)layers", file.name)[1])
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(LlamaConfig(**{**LLAMA_8B, "num_hidden_layers": layers}, dtype=torch.bfloat16))
    model = architecture_of(model, QLoRAConfig(r=16))
    rows = [row for row in json.loads(file.read_text())["rows"] if "PEFT" not in row["what"]]
    assert rows
    for row in rows:
        batch, length = map(int, row["case"].split("x"))
        policy, *ways = row["what"].split(", ")
        run = options(
            batch_size=batch,
            max_length=length,
            liger="on",
            gradient_checkpointing=policy,
            offload_activations="offload" in ways,
            cuda_graphs="graph" in ways,
        )
        found = estimator.estimate(model, run).allocated / GIB
        assert found == pytest.approx(row["peak_gib"], rel=0.07), row


@pytest.mark.gpu
@pytest.mark.parametrize("index", [1, 6])
def test_estimate_is_the_measured_peak(index, monkeypatch):
    """Two steps of the command's own trainer, as `benchmarks/bench_memory.py` measures them for more cases."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import bench_memory

    row = bench_memory.measure(bench_memory.CASES[index], "cuda")
    assert row["estimate"] == pytest.approx(row["measured"], rel=bench_memory.BOUND), row


def test_what_is_not_known_is_said():
    assert "not gated" in architecture_of(gpt2(), QLoRAConfig()).notes[0]
    assert architecture_of(llama(), QLoRAConfig()).notes == ()
    trained_whole = architecture_of(llama(), QLoRAConfig(modules_to_save=["lm_head"]))
    assert "modules_to_save" in trained_whole.notes[0]
