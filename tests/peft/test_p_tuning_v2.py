import pytest
import torch

from qlora_engine import peft
from qlora_engine.peft import PrefixTuning, PTuningV2
from tests.peft.cases import build, inputs, logits
from tests.peft.virtual import check_peft_reads, disturb


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reparametrise", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_peft_reads_its_files_as_prefix_tuning(name, reparametrise, packed, tmp_path):
    method = check_peft_reads(PTuningV2(num_virtual_tokens=5, reparametrise=reparametrise), name, packed, tmp_path)
    loaded = peft.load(build(name, packed), tmp_path)
    assert loaded.config == PTuningV2(num_virtual_tokens=5, train_head=name == "bert")
    assert type(loaded) is type(method)


def test_files_of_prefix_tuning_stay_prefix_tuning(tmp_path):
    peft.apply(build("llama", False), PrefixTuning(num_virtual_tokens=2)).save(tmp_path)
    assert peft.load(build("llama", False), tmp_path).name == "prefix_tuning"


@pytest.mark.parametrize("reparametrise", [False, True])
def test_every_layer_and_the_head_learn(reparametrise):
    """On texts whose class is in half of their tokens, which a frozen random model cannot tell."""
    torch.manual_seed(1)
    net = build("bert", True)
    method = peft.apply(net, PTuningV2(num_virtual_tokens=8, reparametrise=reparametrise, init_std=0.3))
    ids = torch.randint(10, 60, (120, 6))
    labels = torch.arange(120) % 3
    ids[:, ::2] = labels[:, None] + 3
    before = method.prefix().detach().clone()
    optimizer = torch.optim.AdamW(method.trainable_parameters().values(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        net(ids[:90], labels=labels[:90]).loss.backward()
        optimizer.step()
    moved = (method.prefix() - before).abs().amax((2, 3, 4))  # [layers, keys and values]
    assert (moved > 1e-3).all()
    with torch.no_grad():
        found = net(ids[90:]).logits.argmax(-1)
        assert (found == labels[90:]).float().mean() > 0.9
        with method.disabled():
            assert (net(ids[90:]).logits.argmax(-1) == labels[90:]).float().mean() < 0.7


def test_the_head_alone_is_less(tmp_path):
    """`train_head=False` leaves the head out of training and of the file."""
    net = build("bert", False)
    method = peft.apply(net, PTuningV2(num_virtual_tokens=4, train_head=False))
    disturb(method.trainable_parameters().values())
    method.save(tmp_path)
    other = peft.load(build("bert", False), tmp_path)
    assert list(other.tensors()) == ["prompt_embeddings"]
    torch.testing.assert_close(logits(other.model, "bert"), logits(net, "bert"))
    net(**inputs("bert")).loss.backward()
    assert net.classifier.weight.grad is None
