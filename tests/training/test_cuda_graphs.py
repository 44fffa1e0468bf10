import pytest
import torch

import qlora_engine as qe
from qlora_engine.training.activations import recompute_layers
from qlora_engine.training.cuda_graphs import CapturedStep, bucket_length, causal_attention, padded_batch
from qlora_engine.training.loss import IGNORED, causal_lm_loss
from tests.models import tiny
from tests.numerics import relative_rms


def prepared(device, dropout=0.0, **options):
    model = qe.prepare(tiny.llama(**options), qe.QLoRAConfig(r=4, dropout=dropout))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model.to(device).train()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("longest", [8, 100, 1000, 1024, 4096])
def test_buckets_hold_their_batches_and_are_few(longest):
    found = {length: bucket_length(length, longest) for length in range(1, longest + 1)}
    assert all(length <= bucket <= longest for length, bucket in found.items())
    assert len(set(found.values())) <= 4


def test_padding_changes_neither_loss_nor_gradients():
    model, parameters = (made := prepared("cpu")), trained(made)
    ids = torch.randint(tiny.VOCABULARY, (2, 11))
    plain = causal_lm_loss(model, ids, ids)
    expected = torch.autograd.grad(plain.loss, parameters)
    more = padded_batch(ids, ids, 3, 16)
    assert [t.shape for t in more] == [(3, 16)] * 2
    assert bool((more[1][2] == IGNORED).all())
    with causal_attention(model):
        padded = causal_lm_loss(model, *more)
    assert model.config._attn_implementation == "sdpa"
    assert torch.isclose(padded.loss, plain.loss, rtol=1e-6)
    assert (int(padded.count), int(padded.correct)) == (int(plain.count), int(plain.correct))
    for actual, one in zip(torch.autograd.grad(padded.loss, parameters), expected, strict=True):
        assert relative_rms(actual, one) < 1e-5


def test_a_sliding_window_keeps_its_mask():
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MistralConfig(**sizes, num_key_value_heads=2, vocab_size=tiny.VOCABULARY, sliding_window=4)
    model, ids = MistralForCausalLM(config).eval(), torch.arange(9).unsqueeze(0)
    plain = model(ids).logits
    with causal_attention(model):
        assert torch.allclose(model(ids).logits, plain, atol=1e-6)


def test_another_attention_is_refused():
    model = tiny.llama(attn_implementation="eager")
    with pytest.raises(RuntimeError, match="eager"), causal_attention(model):
        pass


def test_without_a_gpu_the_reason_is_given():
    with pytest.raises(RuntimeError, match="on a GPU"):
        CapturedStep(lambda: None, prepared("cpu"))


def batches(count, length=32):
    return [torch.randint(tiny.VOCABULARY, (2, length), device="cuda") for _ in range(count)]


def step_of(model):
    def step(input_ids):
        with causal_attention(model):
            return causal_lm_loss(model, input_ids, input_ids).loss

    return step


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_captured_run_is_the_run_without(policy):
    """Gradient accumulation over two batches of two lengths, an optimizer, and twelve steps."""
    losses, results = {}, {}
    data = [ids for pair in zip(batches(12, 32), batches(12, 48), strict=True) for ids in pair]
    for captured in (False, True):
        model = prepared("cuda")
        first = [p.detach().clone() for p in trained(model)]
        recompute_layers(model, policy)
        optimizer = torch.optim.AdamW(trained(model), 1e-3)
        step, losses[captured] = step_of(model), []
        graph = CapturedStep(step, model)
        for shorter, longer in zip(data[::2], data[1::2], strict=True):
            for ids in (shorter, longer):
                if captured:
                    (loss,) = graph(input_ids=ids)
                else:
                    loss = step(ids)
                    loss.backward()
                losses[captured].append(loss.detach())
            optimizer.step()
            optimizer.zero_grad(set_to_none=len(losses[captured]) % 4 == 0)
        results[captured] = [p.detach().clone() for p in trained(model)]
        assert len(graph.graphs) == (2 if captured else 0)
    assert torch.allclose(torch.stack(losses[True]), torch.stack(losses[False]), rtol=1e-5)
    for actual, expected, before in zip(results[True], results[False], first, strict=True):
        assert relative_rms(actual - before, expected - before) < 1e-2


@pytest.mark.gpu
def test_gradients_that_were_there_stay():
    model = prepared("cuda")
    graph = CapturedStep(step_of(model), model)
    (ids,) = batches(1)
    graph(input_ids=ids)
    once = [p.grad.clone() for p in trained(model)]
    for parameter in trained(model):
        parameter.grad = torch.ones_like(parameter)
    graph(input_ids=ids)
    for parameter, gradient in zip(trained(model), once, strict=True):
        assert torch.allclose(parameter.grad, gradient + 1, atol=1e-6)


@pytest.mark.gpu
def test_a_loss_of_an_earlier_step_may_live():
    model = prepared("cuda")
    (ids,) = batches(1)
    kept = causal_lm_loss(model, ids, ids).loss
    kept.backward()
    expected = [p.grad.clone() for p in trained(model)]
    model.zero_grad()
    (loss,) = CapturedStep(step_of(model), model)(input_ids=ids)
    assert torch.allclose(loss, kept, rtol=1e-6)
    for parameter, gradient in zip(trained(model), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def dropping_model():
    """Two recomputable layers that are nothing but an adapter with dropout: their output is linear in its B."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    class Layer(GradientCheckpointingLayer):
        def __init__(self):
            super().__init__()
            self.linear = qe.QLoRALinear(64, 64, bias=False, r=4, dropout=0.5)
            self.linear.set_nf4_weight(qe.quantize(torch.zeros(64, 64)))
            self.linear.lora_B["default"].data.normal_()

        def forward(self, hidden):
            return self.linear(hidden)

    return torch.nn.Sequential(Layer(), Layer()).cuda().train()


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_dropout_is_new_at_each_call_and_the_same_in_recomputation(policy):
    model = dropping_model()
    recompute_layers(model, policy)
    x, direction = torch.randn(2, 40, 64, device="cuda").unbind(0)
    graph = CapturedStep(lambda x: (model(x) * direction).sum(), model)
    losses = []
    for _ in range(5):
        (loss,) = graph(x=x)
        losses.append(float(loss))
        for layer in model:
            # the loss is linear in B: its slope along B is itself, if backward saw the masks of forward
            B = layer.linear.lora_B["default"]
            assert float((B.detach() * B.grad).sum()) == pytest.approx(losses[-1], rel=1e-3)
        model.zero_grad()
    assert len(set(losses)) == 5


@pytest.mark.gpu
def test_what_cannot_be_captured_is_said():
    model = prepared("cuda")
    (ids,) = batches(1)

    def reads_a_tensor(input_ids):
        loss = causal_lm_loss(model, input_ids, input_ids).loss
        return loss * float(loss.detach() > 0)

    with pytest.raises(RuntimeError, match="cannot be captured"):
        CapturedStep(reads_a_tensor, model)(input_ids=ids)
    graph = CapturedStep(step_of(model), model, limit=1)
    graph(input_ids=ids)
    with pytest.raises(RuntimeError, match="fewer shapes"):
        graph(input_ids=ids[:, :16].contiguous())
    with pytest.raises(TypeError, match="input_ids is int"):
        graph(input_ids=3)
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="recompute_layers"):
        CapturedStep(step_of(model), model)
    recompute_layers(model, "full", offload=True)
    with pytest.raises(RuntimeError, match="offloaded"):
        CapturedStep(step_of(model), model)
