import gc

import pytest
import torch

import qlora_engine as qe
from qlora_engine.training import activations
from qlora_engine.training.activations import GIB, bytes_per_token, recompute_layers
from tests.models import tiny

LAYERS = 4


def prepared(device="cpu", dropout=0.0, **options):
    model = tiny.llama(num_hidden_layers=LAYERS, **options)
    qe.prepare(model, qe.QLoRAConfig(r=4, dropout=dropout))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model.to(device).train()


def gradients(model, ids, seed=3):
    torch.manual_seed(seed)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_policy_gives_the_same_gradients(device, dropout):
    model = prepared(device, dropout)
    ids = torch.randint(tiny.VOCABULARY, (2, 33), device=device)
    recompute_layers(model, "none")
    plain = gradients(model, ids)
    for policy, count in (("full", LAYERS), ("selective", LAYERS - 1)):
        assert recompute_layers(model, policy).recomputed == count
        for actual, expected in zip(gradients(model, ids), plain, strict=True):
            assert torch.equal(actual, expected)


def test_layers_are_called_as_often_as_the_plan_says():
    model, ids = prepared(), torch.zeros(1, 5, dtype=torch.int64)
    calls = []
    for index, layer in enumerate(activations.decoder_layers(model)):
        layer.input_layernorm.register_forward_hook(lambda *_, index=index: calls.append(index))
    recompute_layers(model, "selective")
    calls.clear()  # of what it tried out
    gradients(model, ids)
    assert calls == [0, 1, 2, 3, 2, 1, 0]


def test_the_bytes_of_a_layer_are_what_it_saves():
    model = prepared()
    state = torch.get_rng_state()
    kept, inputs = bytes_per_token(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert inputs == 64 * 4
    # the input, two norms with their roundings, q, k, v before and after rotation, attention, and the MLP
    assert 8 * inputs < kept < 60 * inputs
    assert model.training
    assert not activations.decoder_layers(model)[0]._forward_hooks


def test_a_budget_recomputes_as_few_layers_as_it_takes():
    model, tokens = prepared(), 1000
    kept, inputs = bytes_per_token(model)
    for recomputed in range(LAYERS):
        needed = tokens * ((LAYERS - recomputed) * kept + recomputed * inputs)
        plan = recompute_layers(model, "selective", budget_gib=needed / GIB, tokens=tokens)
        assert plan == (LAYERS, recomputed, (kept, inputs), False)
        flags = [layer.gradient_checkpointing for layer in activations.decoder_layers(model)]
        assert flags == [True] * recomputed + [False] * (LAYERS - recomputed)
    with pytest.raises(ValueError, match="the budget is"):
        recompute_layers(model, "selective", budget_gib=tokens * kept / GIB, tokens=tokens)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"policy": "some"}, "expected one of none, full, selective"),
        ({"policy": "full", "budget_gib": 1.0, "tokens": 5}, "policy 'selective'"),
        ({"policy": "selective", "budget_gib": 1.0}, "needs the tokens"),
        ({"offload": True}, "the model is on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        recompute_layers(prepared(), **arguments)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="Linear has no layers"):
        recompute_layers(torch.nn.Linear(3, 3))


def test_the_last_product_of_a_layer_is_not_computed_again(monkeypatch):
    from qlora_engine import adapter_nodes

    model, ids, calls = prepared(), torch.zeros(1, 5, dtype=torch.int64), []
    operator = adapter_nodes.operator

    def counting(name, x):
        calls.append((name, x.shape[-1]))
        return operator(name, x)

    recompute_layers(model, "full")
    monkeypatch.setattr(adapter_nodes, "operator", counting)
    gradients(model, ids)
    assert calls.count(("linear_nf4", 96)) == LAYERS  # of the MLP's down projection, 96 wide: in forward alone
    assert (
        calls.count(("linear_nf4", 64)) == 2 * LAYERS * 3
    )  # groups that read 64: q with k and v, o, and gate with up; twice


def test_a_layer_that_reads_its_mlps_output_recomputes_it():
    """Gemma 2 normalises it before it is added."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(**sizes, num_key_value_heads=2, head_dim=16, vocab_size=tiny.VOCABULARY)
    model = qe.prepare(Gemma2ForCausalLM(config), qe.QLoRAConfig(r=4)).train()
    assert not activations.ends_with_mlp(model)
    assert activations.ends_with_mlp(prepared())
    ids = torch.randint(tiny.VOCABULARY, (2, 9))
    recompute_layers(model, "none")
    plain = gradients(model, ids)
    recompute_layers(model, "full")
    for actual, expected in zip(gradients(model, ids), plain, strict=True):
        assert torch.equal(actual, expected)


class Shelf:
    """A stand-in for `HostStack` where there is no GPU: counts what waits."""

    def __init__(self):
        self.waiting, self.pushed, self.taken = 0, 0, 0

    def push(self, tensor):
        return Shelved(self, tensor)


class Shelved:
    def __init__(self, shelf, tensor):
        self.shelf, self.copy, self.requires_grad = shelf, tensor.detach().clone(), tensor.requires_grad
        self.tensor = tensor
        shelf.pushed += 1
        shelf.waiting += 1

    def release(self):
        self.tensor = None

    def take(self):
        if self.tensor is None:
            self.shelf.taken += 1
            return self.copy.requires_grad_(self.requires_grad)
        return self.tensor

    def __del__(self):
        self.shelf.waiting -= 1


def test_inputs_are_put_away_once_and_let_go_at_once(monkeypatch):
    model, ids, shelf = prepared(dropout=0.3), torch.randint(tiny.VOCABULARY, (2, 9)), Shelf()
    monkeypatch.setattr(activations, "LEAST_OFFLOADED", 1)
    recompute_layers(model, "full")
    plain = gradients(model, ids)
    for layer in activations.decoder_layers(model):
        layer._gradient_checkpointing_func.host = shelf
    gc.disable()  # what is let go must not wait for the collector: pinned buffers would pile up
    try:
        for step in range(1, 3):
            for actual, expected in zip(gradients(model, ids), plain, strict=True):
                assert torch.equal(actual, expected)
            assert (shelf.pushed, shelf.taken, shelf.waiting) == (step * LAYERS, step * LAYERS, 0)
        model(input_ids=ids, labels=ids, use_cache=False)  # a forward whose graph is dropped
        assert shelf.waiting == 0
        with torch.no_grad():
            model(input_ids=ids)
        assert shelf.pushed == 3 * LAYERS
    finally:
        gc.enable()


@pytest.mark.gpu
def test_inputs_that_wait_on_the_host_come_back_as_they_were():
    model = prepared("cuda", 0.2, hidden_size=256, intermediate_size=320)
    ids = torch.randint(tiny.VOCABULARY, (4, 96), device="cuda")
    recompute_layers(model, "full")
    plain = gradients(model, ids)
    plan = recompute_layers(model, "full", offload=True)
    assert plan.offloaded
    stack = activations.decoder_layers(model)[0]._gradient_checkpointing_func.host
    for _ in range(3):
        for actual, expected in zip(gradients(model, ids), plain, strict=True):
            assert torch.equal(actual, expected)
        assert sum(map(len, stack.free.values())) == LAYERS  # every buffer is back, and none was added
    model(input_ids=ids, labels=ids, use_cache=False)  # a forward whose graph is dropped
    assert sum(map(len, stack.free.values())) == LAYERS


@pytest.mark.gpu
def test_offloading_frees_the_inputs():
    model = prepared("cuda", hidden_size=256, intermediate_size=320).bfloat16()
    ids = torch.randint(tiny.VOCABULARY, (16, 512), device="cuda")
    held = {}
    for offload in (False, True):
        recompute_layers(model, "full", offload=offload)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        torch.cuda.synchronize()
        held[offload] = torch.cuda.memory_allocated()
        hidden.sum().backward()
        del hidden
        model.zero_grad()
    assert held[False] - held[True] >= (LAYERS - 1) * ids.numel() * 256 * 2
