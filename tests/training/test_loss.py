import pytest
import torch
import torch.nn.functional as F

import qlora_engine as qe
from qlora_engine import quantize
from qlora_engine.quantization.weight import split_rows
from qlora_engine.training import loss
from qlora_engine.training.loss import (
    IGNORED,
    causal_lm_loss,
    linear_cross_entropy,
    sequence_log_probs,
    why_no_causal_loss,
)
from tests.models import tiny
from tests.numerics import relative_rms

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def wide_loss(hidden, weight, labels):
    """(losses, correct) in float64 from logits rounded as the product leaves them."""
    logits = hidden @ weight.T
    counts = labels != IGNORED
    correct = (logits.argmax(1) == labels) & counts
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none"), correct


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ("M", "H", "V", "chunk"), [(37, 24, 131, 8), (5, 64, 5000, None), (1, 8, 3, 4), (64, 16, 96, 64)]
)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_against_float64(device, dtype, M, H, V, chunk, reduction, poisoned_memory):
    if chunk is None and device == "cpu" and dtype != torch.float32:
        pytest.skip("the same code as in float32")
    hidden = torch.randn(M, H, dtype=dtype, device=device).requires_grad_()
    weight = torch.randn(V, H, dtype=dtype, device=device).requires_grad_()
    labels = torch.randint(V, (M,), device=device)
    if M > 1:
        labels[::3] = IGNORED
    # where each row is given, each has a factor of its own in what is minimised
    factors = torch.full((M,), 0.5, device=device) if reduction == "sum" else torch.randn(M, device=device)
    found, correct = linear_cross_entropy(hidden, weight, labels, chunk, reduction=reduction)
    total = found * 0.5 if reduction == "sum" else found @ factors
    total.backward()
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected, expected_correct = wide_loss(*wide, labels)
    (expected @ factors.double()).backward()
    assert found.dtype == torch.float32
    exact = (expected.sum() if reduction == "sum" else expected).detach()
    assert float((found.detach() - exact).norm()) <= BOUNDS[dtype] * float(exact.norm()) + 1e-6
    for actual, one in ((hidden, wide[0]), (weight, wide[1])):
        assert actual.grad.dtype == dtype
        assert relative_rms(actual.grad, one.grad) < BOUNDS[dtype]
    if dtype == torch.float32:
        assert torch.equal(correct.bool(), expected_correct)


def test_repeats_and_takes_no_second_backward(device):
    hidden = torch.randn(20, 16, device=device, requires_grad=True)
    weight, labels = torch.randn(50, 16, device=device), torch.randint(50, (20,), device=device)
    first, second = (linear_cross_entropy(hidden, weight, labels, 7)[0] for _ in range(2))
    assert torch.equal(first, second)
    first.backward()
    with pytest.raises(RuntimeError, match="one backward pass"):
        first.backward()


def test_all_ignored_is_zero(device):
    hidden = torch.randn(4, 8, device=device, requires_grad=True)
    labels = torch.full((4,), IGNORED, device=device)
    total, correct = linear_cross_entropy(hidden, torch.randn(9, 8, device=device), labels)
    total.backward()
    assert float(total.detach()) == 0
    assert int(correct.sum()) == 0
    assert not hidden.grad.any()


def test_frozen_weight_needs_no_logits_in_backward(device, monkeypatch):
    """With a frozen head, as every adapter has it, rows are weighed without a further product."""
    from qlora_engine.training import loss

    hidden = torch.randn(12, 16, device=device, requires_grad=True)
    weight, labels = torch.randn(50, 16, device=device), torch.randint(50, (12,), device=device)
    losses, _ = linear_cross_entropy(hidden, weight, labels, 5, reduction="none")
    monkeypatch.setattr(loss, "_chunks_of_logits", None)
    losses[3].backward()
    assert hidden.grad[3].any()
    assert not hidden.grad[:3].any()
    assert not hidden.grad[4:].any()


def test_log_probs_of_sequences_and_their_gradients():
    """On a padded batch, against float64 log-softmax of whole logits, each sequence with a factor of its own."""
    model = tiny.llama().float()
    ids = torch.randint(tiny.VOCABULARY, (3, 9))
    mask, labels, factors = torch.ones_like(ids), ids.clone(), torch.tensor([0.5, -2.0, 1.0])
    mask[1, 6:] = 0
    labels[:, :3], labels[1, 6:], labels[2] = IGNORED, IGNORED, IGNORED
    found = sequence_log_probs(model, ids, labels, attention_mask=mask)
    actual = torch.autograd.grad(found @ factors, list(model.parameters()))
    wide = model.double()
    scores = F.log_softmax(wide(input_ids=ids, attention_mask=mask).logits, -1)[:, :-1]
    counts = labels[:, 1:] != IGNORED
    expected = (scores.gather(2, ids[:, 1:, None]).squeeze(2) * counts).sum(1)
    assert relative_rms(found, expected) < 1e-5
    assert float(found[2]) == 0
    slopes = torch.autograd.grad(expected @ factors.double(), list(wide.parameters()))
    for one, other in zip(actual, slopes, strict=True):
        assert relative_rms(one, other) < 1e-4


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\[4, 8\], weight \[9, 7\]"):
        linear_cross_entropy(torch.randn(4, 8), torch.randn(9, 7), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="reduction is 'mean'"):
        linear_cross_entropy(torch.randn(4, 8), torch.randn(9, 8), torch.zeros(4).long(), reduction="mean")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ("M", "H", "V", "most"), [(37, 64, 515, 4), (37, 64, 515, 1 << 20), (9, 256, 131, 1), (5, 24, 31, 1)]
)
def test_a_head_in_four_bits(device, dtype, M, H, V, most, double_quant, monkeypatch, poisoned_memory):
    """A part of the vocabulary at a time, or all: against float64 of the decoded weight."""
    w4 = quantize(torch.randn(V, H, dtype=dtype, device=device), double_quant=double_quant)
    monkeypatch.setattr(loss, "SLICE_BYTES", most * H * dtype.itemsize)
    parts = split_rows(w4, most)
    assert (len(parts) > 1) == (most < V and H >= 64)
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), w4.dequantize())
    # half as large as usual: kernels round a weight or its levels, and the larger logits are the more that moves them
    hidden = torch.randn(M, H, dtype=dtype, device=device).mul_(0.5).requires_grad_()
    labels = torch.randint(V, (M,), device=device)
    labels[::3] = IGNORED
    total, correct = linear_cross_entropy(hidden, w4, labels, 8)
    (total * 0.5).backward()
    wide = hidden.detach().double().requires_grad_()
    expected, expected_correct = wide_loss(wide, w4.dequantize(dtype).double(), labels)
    expected = expected.sum()
    (expected * 0.5).backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=BOUNDS[dtype])
    assert relative_rms(hidden.grad, wide.grad) < BOUNDS[dtype]
    if dtype == torch.float32:
        assert torch.equal(correct.bool(), expected_correct)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, w4, labels, 8)[0], total.detach())


@pytest.mark.parametrize("tied", [False, True])
def test_is_the_loss_of_a_model_with_a_head_in_four_bits(tied):
    config = qe.QLoRAConfig(r=4, quantize_embeddings=True, quantize_head=True)
    model = qe.prepare(tiny.llama(tie_word_embeddings=tied), config)
    assert why_no_causal_loss(model) is None
    ids = torch.randint(tiny.VOCABULARY, (2, 9))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = model(input_ids=ids, labels=ids).loss
    ours = causal_lm_loss(model, ids, ids)
    assert torch.isclose(ours.loss, own, rtol=1e-5)
    for one, other in zip(
        torch.autograd.grad(ours.loss, parameters), torch.autograd.grad(own, parameters), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    model = qe.prepare(tiny.llama(), qe.QLoRAConfig(r=4, target_modules="lm_head"))
    assert "no plain" in why_no_causal_loss(model), "an adapter of the head would not be in the loss"


@pytest.mark.parametrize("num_items", [None, 11])
def test_is_the_models_own_loss(num_items):
    model = tiny.llama()
    assert why_no_causal_loss(model) is None
    ids = torch.randint(tiny.VOCABULARY, (2, 9))
    labels = ids.clone()
    labels[0, :4] = IGNORED
    own = model(input_ids=ids, labels=labels, num_items_in_batch=num_items).loss
    expected = torch.autograd.grad(own, list(model.parameters()))
    ours = causal_lm_loss(model, ids, labels, num_items)
    actual = torch.autograd.grad(ours.loss, list(model.parameters()))
    assert torch.isclose(ours.loss, own, rtol=1e-5)
    assert int(ours.count) == 5 + 8  # of nine labels a row, the first predicts none; three more are left out
    for one, other in zip(actual, expected, strict=True):
        assert relative_rms(one, other) < 1e-5


def test_other_models_are_told_apart():
    assert "loss" in why_no_causal_loss(tiny.bert())
    model = tiny.llama()
    model.lm_head.register_forward_hook(lambda *_: None)
    assert "listens" in why_no_causal_loss(model)
    model = tiny.llama()
    plain = model.forward
    model.forward = lambda **inputs: scaled(plain(**inputs))
    assert "not the product" in why_no_causal_loss(model)
    assert model.training


def scaled(outputs):
    outputs.logits = outputs.logits * 0.5
    return outputs
