"""Models whose layers act together compute what they compute layer by layer, and can be taken apart again."""

import copy
import io

import pytest
import torch
from torch import nn

import qlora_engine as qe
from qlora_engine.models.grouping import activation_name, group_layers, ungroup_layers
from qlora_engine.nn.grouped import PATIENCE, GatedMLPForward, SharedInput
from tests.models import tiny

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": tiny.VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# architecture -> activations of its gated MLPs; None: its MLP is not `down(act(gate(x)) * up(x))` of three layers
ARCHITECTURES = {
    "Llama": "silu",
    "Mistral": "silu",
    "Qwen2": "silu",
    "Qwen3": "silu",
    "Gemma": "gelu_tanh",
    "Gemma2": "gelu_tanh",
    "Phi": None,
    "Phi3": "silu",
    "Glm": "silu",
}
PACKED_ATTENTION = ("Phi3",)  # q, k and v are one layer already


def build(architecture="Llama", **options):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**{**SIZES, **options})
    if hasattr(config, "head_dim"):
        config.head_dim = 16
    return getattr(transformers, f"{architecture}ForCausalLM")(config)


def prepared(architecture="Llama", device="cpu", fused=True, **options):
    model = build(architecture)
    torch.manual_seed(1)
    model = qe.prepare(model, qe.QLoRAConfig(r=4, alpha=8, fused=fused, **options), device=device)
    for parameter in model.parameters():
        if parameter.requires_grad:  # a new B is zero, and A would have no gradient
            nn.init.normal_(parameter, std=0.1)
    return model


def groups(model):
    return {id(m.group): m.group for m in model.modules() if getattr(m, "group", None) is not None}.values()


def mlps(model):
    return [m.forward for m in model.modules() if isinstance(m.__dict__.get("forward"), GatedMLPForward)]


def loss_and_gradients(model, device="cpu"):
    model.zero_grad()
    tokens = tiny.token_ids().to(device)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first, second):
    torch.testing.assert_close(first[0], second[0], rtol=1e-5, atol=1e-6)
    assert first[1].keys() == second[1].keys()
    assert first[1]
    for name, grad in first[1].items():
        torch.testing.assert_close(grad, second[1][name], rtol=1e-3, atol=1e-5)


@pytest.fixture
def calls(monkeypatch):
    """Counts the passes of groups and of MLPs."""
    from qlora_engine import functional

    counts = {"qlora_group": 0, "qlora_mlp": 0}

    def counted(name, function):
        def call(*arguments):
            counts[name] += 1
            return function(*arguments)

        return call

    for name in counts:
        monkeypatch.setattr(functional, name, counted(name, getattr(functional, name)))
    return counts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_layer_by_layer(architecture, device, calls):
    plain = prepared(architecture, device, fused=False)
    assert not groups(plain)
    assert not mlps(plain)
    expected = loss_and_gradients(plain, device)
    assert calls["qlora_mlp"] == 0

    model = prepared(architecture, device)
    activation = ARCHITECTURES[architecture]
    assert [len(group.layers) for group in groups(model)] == ([] if architecture in PACKED_ATTENTION else [3, 3])
    assert [mlp.activation for mlp in mlps(model)] == ([activation] * 2 if activation else [])
    calls.update(qlora_group=0, qlora_mlp=0)
    actual = loss_and_gradients(model, device)
    assert calls["qlora_mlp"] == (2 if activation else 0)
    assert calls["qlora_group"] == (
        2 + 2 if activation else 2 + 6
    )  # q, k, v in one; the attention's output by itself
    assert_same(actual, expected)
    ungroup_layers(model)
    assert not groups(model)
    assert not mlps(model)
    assert_same(loss_and_gradients(model, device), expected)


def test_names_and_files_stay(tmp_path):
    plain, model = prepared(fused=False), prepared()
    assert list(plain.state_dict()) == list(model.state_dict())
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    qe.save_adapter(model, tmp_path)
    other = qe.quantize_model(build())
    qe.load_adapter(other, tmp_path)
    assert len(mlps(other)) == 2
    assert_same(
        loss_and_gradients(qe.load_adapter(qe.quantize_model(build()), tmp_path, trainable=True)),
        loss_and_gradients(model),
    )


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_are_whole(copied):
    model = prepared()
    expected = loss_and_gradients(model)
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    layers = set(other.modules())
    assert all(layer in layers for group in groups(other) for layer in group.layers)
    assert all(mlp.module in layers for mlp in mlps(other))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert_same(loss_and_gradients(other), expected)


def test_states_that_are_not_simple_compute_layer_by_layer(calls):
    plain, model = prepared(fused=False), prepared()
    tokens = tiny.token_ids()

    def compare(used):
        with torch.no_grad():
            calls.update(qlora_mlp=0)
            torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-5)
        assert (calls["qlora_mlp"] > 0) == used

    compare(used=True)
    with qe.adapters_disabled(model), qe.adapters_disabled(plain):
        compare(used=False)
    for m in (plain, model):
        torch.manual_seed(2)
        qe.prepare(m, qe.QLoRAConfig(r=2, adapter_name="second", fused=m is model))
        qe.set_adapters(m, ["default", "second"])
    compare(used=False)
    for m in (plain, model):
        qe.set_adapters(m, "default")
    compare(used=True)
    seen = []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    compare(used=True)  # the other layer's MLP
    assert seen == [1]
    handle.remove()
    for m in (plain, model):
        qe.merge(m, into="nf4")
    compare(used=False)


def test_dropout_that_differs_inside_a_group(calls):
    model = prepared()
    for layer in (model.model.layers[0].self_attn.k_proj, model.model.layers[0].mlp.up_proj):
        layer.adapters = {name: type(s)(s.r, s.alpha, 0.5, s.rslora) for name, s in layer.adapters.items()}
    calls.update(qlora_mlp=0)
    loss_and_gradients(model.train())
    assert calls["qlora_mlp"] == 1


def test_dropout_and_gradient_checkpointing():
    results = []
    for checkpointing in (False, True):
        model = prepared(dropout=0.3)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(4)
        results.append(loss_and_gradients(model))
    assert_same(*results)


def test_generates_as_before():
    tokens = tiny.token_ids(1, 5)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = prepared(fused=False).generate(tokens, **options)
    assert torch.equal(prepared().generate(tokens, **options), expected)


def test_compiles_without_a_graph_break():
    torch.compiler.reset()
    model = prepared()
    layer, x = model.model.layers[0].mlp, torch.randn(3, 64)
    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)


def test_a_prepared_model_compiles_without_a_graph_break():
    torch.compiler.reset()
    model, tokens = prepared(), tiny.token_ids()
    expected = loss_and_gradients(model)

    def loss_of(tokens):
        return model(tokens, labels=tokens, use_cache=False).loss

    model.zero_grad()
    loss = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(tokens)
    loss.backward()
    assert_same((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), expected)


class Imposter(nn.Module):
    """Has the layers of a gated MLP, and computes something else with them."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)
        self.act_fn = nn.ReLU() if kind == "relu" else nn.SiLU()
        if kind == "norm":
            self.norm = nn.LayerNorm(96)

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.kind == "swapped":
            gate, up = up, gate
        h = self.act_fn(gate) * up
        if self.kind == "norm":
            h = self.norm(h)
        return self.down_proj(h) + (x if self.kind == "residual" else 0)


@pytest.mark.parametrize("kind", ["swapped", "residual", "norm", "relu"])
def test_another_forward_is_left_alone(kind):
    torch.manual_seed(0)
    module = nn.Sequential(Imposter(kind))
    x = torch.randn(3, 64)
    model = qe.prepare(module, qe.QLoRAConfig(r=4))
    assert not mlps(model)
    y = model(x)
    ungroup_layers(model)
    torch.testing.assert_close(y, model(x))


def test_the_probe_leaves_no_trace():
    module = nn.Sequential(Imposter("plain")).train()
    qe.prepare(module, qe.QLoRAConfig(r=4, dropout=0.5, fused=False))
    state = torch.get_rng_state()
    group_layers(module)
    assert len(mlps(module)) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert module[0].gate_proj.training


def test_activation_names():
    assert activation_name(nn.SiLU()) == "silu"
    assert activation_name(nn.GELU()) == "gelu"
    assert activation_name(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert activation_name(torch.tanh) is None
    assert activation_name(lambda x: x.sum()) is None


def three_layers(r=4):
    layers = nn.ModuleList([qe.QLoRALinear(64, out, r=r) for out in (32, 16, 16)])
    group = SharedInput(layers)
    for layer in layers:
        layer.group = group
    return layers, group


def test_only_the_very_same_input_is_shared():
    (q, k, v), _ = three_layers()
    alone = copy.deepcopy(k), copy.deepcopy(v)
    for layer in alone:
        layer.group = None
    x, other = torch.randn(3, 64), torch.randn(3, 64)
    q(x)
    torch.testing.assert_close(k(other), alone[0](other))
    q(x)
    x += 1  # the same tensor, with other numbers
    torch.testing.assert_close(k(x), alone[0](x))
    q(x)
    with torch.no_grad():  # a result without a graph is another
        assert not k(x).requires_grad
    q(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert k(x).dtype == torch.bfloat16
    q(x)
    torch.testing.assert_close(k(x), alone[0](x))
    torch.testing.assert_close(v(x), alone[1](x))
    torch.testing.assert_close(v(x), alone[1](x))  # handed out once


def test_a_group_that_nobody_uses_is_given_up(calls):
    (q, _, _), group = three_layers()
    x = torch.randn(3, 64)
    for _ in range(PATIENCE + 3):
        q(x)
    assert group.unused == PATIENCE
    assert not group.waiting


def test_a_checkpoint_recomputes_what_its_forward_did():
    """Giving a group up in the middle of a backward would change what is saved."""
    from torch.utils.checkpoint import checkpoint

    (q, _, _), group = three_layers()
    x = torch.randn(3, 64, requires_grad=True)
    for _ in range(PATIENCE + 3):
        checkpoint(lambda x: q(x).square(), x, use_reentrant=False).sum().backward()
    assert group.unused == PATIENCE


def test_hooks_on_all_modules_see_every_layer():
    model, seen = prepared(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    model(tiny.token_ids())
    handle.remove()
    assert {m for m in model.modules() if isinstance(m, qe.QLoRALinear)} <= set(seen)


def test_nothing_is_kept_after_the_last_layer():
    (q, k, v), group = three_layers()
    x = torch.randn(3, 64)
    for layer in (q, k, v):
        layer(x)
    assert not group.waiting
    assert group.input is None
