"""What every method must hold, on every kind of model, in full precision and on a 4-bit base."""

import copy
import json

import pytest
import torch

from qlora_engine import peft
from tests.peft.cases import CASES, build, inputs, logits

EVERY = [
    pytest.param(name, model, packed, id=f"{name}-{model}-{'nf4' if packed else 'full'}")
    for name, case in CASES.items()
    for model in case.models
    for packed in (False, True)
]
CAUSAL = [p for p in EVERY if p.values[1] != "bert"]
everywhere = pytest.mark.parametrize(("name", "model", "packed"), EVERY)
generating = pytest.mark.parametrize(("name", "model", "packed"), CAUSAL)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def train(model, method, name, case, steps=8):
    """Loss before and after a few steps."""
    optimizer = torch.optim.AdamW(method.trainable_parameters().values(), lr=case.learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(**inputs(name)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], model(**inputs(name)).loss.item()


def test_every_method_has_a_case():
    assert {case.config.name for case in CASES.values()} == set(peft.METHODS)


@everywhere
def test_learns_and_leaves_no_trace(name, model, packed):
    case, net = CASES[name], build(model, packed)
    before, expected = bits(net), logits(net, model)
    wanted = {n: p.requires_grad for n, p in net.named_parameters()}
    method = peft.apply(net, case.config)
    assert peft.applied(net) == [method]
    if case.changes_at_once is None:
        torch.testing.assert_close(logits(net, model), expected)
    else:
        assert torch.equal(logits(net, model), expected) != case.changes_at_once
    trained = {id(p) for p in method.trainable_parameters().values()}
    assert trained
    assert {id(p) for p in net.parameters() if p.requires_grad} == trained
    first, last = train(net, method, model, case)
    assert last < first - 1e-3
    assert all(p.grad is not None for p in method.trainable_parameters().values())
    assert all(p.grad is None for p in net.parameters() if id(p) not in trained)
    learnt = logits(net, model)
    assert not torch.equal(learnt, expected)

    with method.disabled():
        assert torch.equal(logits(net, model), expected)
    assert torch.equal(logits(net, model), learnt)
    assert method.remove() is net
    assert peft.applied(net) == []
    same_bits(bits(net), before)
    assert torch.equal(logits(net, model), expected)
    assert {n: p.requires_grad for n, p in net.named_parameters()} == wanted
    with pytest.raises(peft.MethodError, match="not on this model"):
        method.remove()


@everywhere
def test_saved_and_loaded_elsewhere(name, model, packed, tmp_path):
    case, net = CASES[name], build(model, packed)
    method = peft.apply(net, case.config)
    train(net, method, model, case, steps=3)
    method.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    other = build(model, packed)
    loaded = peft.load(other, tmp_path)
    assert type(loaded) is type(method)
    torch.testing.assert_close(logits(other, model), logits(net, model), rtol=1e-5, atol=1e-5)
    # what was learnt is saved and loaded while the method is disabled as well
    with method.disabled():
        kept = method.state_dict()
        method.save(tmp_path / "disabled")
    same_bits(kept, method.state_dict())
    other = build(model, packed)
    late = peft.load(other, tmp_path / "disabled")
    late.disable()
    state = late.state_dict()  # numbers become zero, but not positions and the like
    late.load_state_dict({k: torch.zeros_like(v) if v.is_floating_point() else v for k, v in state.items()})
    assert torch.equal(logits(other, model), logits(build(model, packed), model))
    late.load_state_dict(loaded.state_dict())
    late.enable()
    torch.testing.assert_close(logits(other, model), logits(net, model), rtol=1e-5, atol=1e-5)
    # a file of another size is refused, and leaves the model as it was
    twin = build(model, packed)
    state = method.state_dict()
    key = next(iter(state))
    with pytest.raises(peft.MethodError, match="missing"):
        peft.apply(twin, case.config).load_state_dict({k: v for k, v in state.items() if k != key})
    with pytest.raises(peft.MethodError, match="unexpected"):
        peft.applied(twin)[0].load_state_dict(state | {"nonsense": torch.zeros(1)})
    with pytest.raises(peft.MethodError, match="this model needs"):
        peft.applied(twin)[0].load_state_dict(state | {key: torch.zeros(7, 7, 7)})


@generating
def test_generates_with_the_cache_as_without(name, model, packed):
    case, net = CASES[name], build(model, packed)
    method = peft.apply(net, case.config)
    train(net, method, model, case, steps=3)
    ids = inputs(model)["input_ids"][:, :6]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids)
    cached = net.generate(ids, attention_mask=mask, use_cache=True, **options)
    plain = net.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, plain)
    assert cached.shape == (3, 11)


@everywhere
def test_gradient_checkpointing_and_autocast(name, model, packed):
    case, net = CASES[name], build(model, packed)
    net.train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    method = peft.apply(net, case.config)

    def gradients(**options):
        net.zero_grad()
        with torch.autocast("cpu", **options) if options else torch.enable_grad():
            loss = net(**inputs(model)).loss
        loss.backward()
        return [p.grad.clone() for p in method.trainable_parameters().values()]

    plain = gradients()
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for mine, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    net.gradient_checkpointing_disable()
    for mine, theirs in zip(gradients(dtype=torch.bfloat16), plain, strict=True):
        assert torch.isfinite(mine).all()
        assert (mine - theirs).norm() <= 0.2 * theirs.norm() + 1e-4


@everywhere
def test_copies_and_reports(name, model, packed):
    case, net = CASES[name], build(model, packed)
    method = peft.apply(net, case.config)
    twin = copy.deepcopy(net)
    assert torch.equal(logits(twin, model), logits(net, model))
    report = method.report()
    count = sum(p.numel() for p in method.trainable_parameters().values())
    assert report.trainable == count
    assert report.total == sum(p.numel() for p in build(model, False).parameters()) or name == "bitfit"
    assert f"{count:,}" in str(report)
    assert json.dumps(report.notes)


def test_unknown_files_are_refused(tmp_path):
    net = build("llama", False)
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        peft.load(net, tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(peft.MethodError, match="not the configuration"):
        peft.load(net, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "TELEPATHY"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickle"):
        peft.load(net, tmp_path)
    assert peft.applied(net) == []
