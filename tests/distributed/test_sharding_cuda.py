"""A model sharded over one rank on a GPU: what `fully_shard` does to it, through NCCL."""

import pytest
import torch
import torch.distributed as dist

import qlora_engine as qe
from qlora_engine.models.sharding import whole
from qlora_engine.optim import PagedAdamW

pytest.importorskip("transformers")

from tests.models.tiny import llama, token_ids

pytestmark = pytest.mark.gpu
STEPS = 4


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def losses_of(model, optimizer, steps=STEPS) -> list[float]:
    ids, losses = token_ids(4, 32).cuda(), []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def make(sharded: bool, budget: int | None):
    model = qe.prepare(llama().to(torch.bfloat16), qe.QLoRAConfig(r=8), device="cuda").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    if sharded:
        qe.distributed.shard(model)
    params = [p for p in model.parameters() if p.requires_grad]
    return model, PagedAdamW(params, lr=1e-2, max_grad_norm=1.0, device_budget=budget)


@pytest.mark.parametrize("budget", [None, 0])
def test_one_rank_is_the_whole_model(one_rank, tmp_path, budget):
    plain, plain_optimizer = make(False, budget)
    expected = losses_of(plain, plain_optimizer)
    model, optimizer = make(True, budget)
    assert losses_of(model, optimizer, 2) == expected[:2]
    qe.distributed.save_checkpoint(tmp_path / "middle", model, optimizer)
    assert losses_of(model, optimizer, 2) == expected[2:]
    again, resumed = make(True, budget)
    qe.distributed.load_checkpoint(tmp_path / "middle", again, resumed)
    assert losses_of(again, resumed, 2) == expected[2:]
    packed = [p for n, p in model.named_parameters() if n.endswith("proj.weight")]
    assert {p.dtype for p in packed} == {torch.uint8}
    for name, parameter in plain.named_parameters():
        assert torch.equal(whole(dict(model.named_parameters())[name].detach()), parameter.detach()), name


def test_a_model_in_host_memory_is_sharded_onto_the_gpu(one_rank, tmp_path):
    llama().save_pretrained(tmp_path)
    config = qe.QLoRAConfig(r=8)
    plain = qe.load_quantized(tmp_path, config, device="cuda", dtype=torch.bfloat16, progress=False).train()
    qe.save_adapter(plain, tmp_path / "adapter")
    options = {"adapter": tmp_path / "adapter", "on_host": True, "progress": False}
    model = qe.load_quantized(tmp_path, device="cuda", dtype=torch.bfloat16, **options).train()
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}
    qe.distributed.shard(model, device="cuda")
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cuda"}
    expected, found = (
        losses_of(m, PagedAdamW([p for p in m.parameters() if p.requires_grad])) for m in (plain, model)
    )
    assert found == expected
