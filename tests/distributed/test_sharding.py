"""A model sharded over processes against the same model in one: losses, bytes, gradients' norm, files, resuming."""

import dataclasses
import json
import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

import qlora_engine as qe
from qlora_engine.models import watch
from qlora_engine.models.sharding import find_blocks, whole
from qlora_engine.nn import NF4Linear
from qlora_engine.optim import PagedAdamW
from tests.distributed.launch import run_ranks

pytest.importorskip("transformers")

from tests.models.tiny import llama, qwen3_moe, token_ids

STEPS, SAVED_AFTER = 6, 3
FROZEN = ("weight", "absmax", "nested_absmax", "nested_offset")


def make_model(sharded: bool, checkpointing: bool = True, blocksize: int = 64):
    model = qe.prepare(llama(), qe.QLoRAConfig(r=5, alpha=8, blocksize=blocksize))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return qe.distributed.shard(model.train()) if sharded else model.train()


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimizer_of(model, bits=32):
    return PagedAdamW(trainable(model), lr=1e-2, weight_decay=0.1, max_grad_norm=0.5, bits=bits, min_8bit_size=64)


def train(model, optimizer, first: int, last: int) -> list[float]:
    """Losses over the whole batch of steps `first` to `last`; processes share the batch's rows."""
    several = dist.is_initialized()
    losses = []
    for step in range(first, last):
        rows = token_ids(8, 10 + step)
        rows = rows[dist.get_rank() :: dist.get_world_size()] if several else rows
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shown = loss.detach().clone()
        if several:
            dist.all_reduce(shown)
            shown /= dist.get_world_size()
        losses.append(float(shown))
    return losses


def base_bytes(model) -> dict[str, torch.Tensor]:
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, NF4Linear)}
    return {f"{p}.{n}": whole(getattr(layer, n).detach()).clone() for p, layer in layers.items() for n in FROZEN}


def sharded_run(folder: str, of_one: str) -> dict:
    """What one rank sees of a run that saves in the middle, and of its second half after loading that."""
    model = make_model(sharded=True)
    parts = [p for n, p in model.named_parameters() if n.endswith("proj.weight")]
    kinds = {
        "packed": {str(p.dtype) for p in parts},
        "bytes": sum(p.to_local().nbytes for p in parts),
        "whole": sum(p.numel() for p in parts),
    }
    optimizer = optimizer_of(model)
    losses = train(model, optimizer, 0, SAVED_AFTER)
    qe.distributed.save_checkpoint(f"{folder}/middle", model, optimizer, {"step": SAVED_AFTER})
    losses += train(model, optimizer, SAVED_AFTER, STEPS)
    qe.save_adapter(model, f"{folder}/adapter")
    again = make_model(sharded=True)
    resumed = optimizer_of(again)
    extra = qe.distributed.load_checkpoint(f"{folder}/middle", again, resumed)
    second = train(again, resumed, extra["step"], STEPS)
    qe.load_adapter(again, f"{folder}/adapter")
    same = all(torch.equal(whole(a), whole(b)) for a, b in zip(trainable(model), trainable(again), strict=True))
    qe.distributed.load_checkpoint(f"{of_one}/middle", again, resumed)
    return {
        "losses": losses,
        "from_one": train(again, resumed, SAVED_AFTER, STEPS),
        "resumed": second,
        "norm": float(optimizer.last_grad_norm),
        "adapter_reloaded": same,
        "base": {name: tensor.numpy() for name, tensor in base_bytes(model).items()},
        **kinds,
    }


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The run in one process."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("single")
    model = make_model(sharded=False)
    start = base_bytes(model)
    optimizer = optimizer_of(model)
    losses = train(model, optimizer, 0, SAVED_AFTER)
    qe.distributed.save_checkpoint(folder / "middle", model, optimizer, {"step": SAVED_AFTER})
    losses += train(model, optimizer, SAVED_AFTER, STEPS)
    qe.save_adapter(model, folder / "adapter")
    return {"folder": folder, "losses": losses, "base": start, "norm": float(optimizer.last_grad_norm)}


def resumed_elsewhere(folder: str) -> list[float]:
    model = make_model(sharded=True)
    optimizer = optimizer_of(model)
    extra = qe.distributed.load_checkpoint(folder, model, optimizer)
    return train(model, optimizer, extra["step"], STEPS)


def test_sharded_training_is_that_of_one_process(single, tmp_path):
    found = run_ranks(sharded_run, 2, str(tmp_path), str(single["folder"]))
    for rank in found:
        assert rank["losses"] == pytest.approx(single["losses"], rel=1e-5)
        assert rank["norm"] == pytest.approx(single["norm"], rel=1e-4), "of all processes' gradients"
        assert rank["resumed"] == rank["losses"][SAVED_AFTER:], "a resumed run is bit for bit the same"
        assert rank["from_one"] == pytest.approx(single["losses"][SAVED_AFTER:], rel=1e-5)
        assert rank["packed"] == {"torch.uint8"}
        assert rank["adapter_reloaded"]
    assert sum(rank["bytes"] for rank in found) == found[0]["whole"], "no packed byte is on two ranks"
    for name, values in found[0]["base"].items():
        assert torch.equal(torch.from_numpy(values), single["base"][name]), name

    model = make_model(sharded=False)
    optimizer = optimizer_of(model)
    qe.distributed.load_checkpoint(tmp_path / "middle", model, optimizer)
    assert train(model, optimizer, SAVED_AFTER, STEPS) == pytest.approx(single["losses"][SAVED_AFTER:], rel=1e-5)
    for losses in run_ranks(resumed_elsewhere, 4, str(tmp_path / "middle")):
        assert losses == pytest.approx(single["losses"][SAVED_AFTER:], rel=1e-5)

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config == json.loads((single["folder"] / "adapter" / "adapter_config.json").read_text())
    from safetensors.torch import load_file

    mine, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (tmp_path, single["folder"]))
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)


def eight_bit_run(folder: str) -> tuple:
    model = make_model(sharded=True, checkpointing=False, blocksize=128)
    optimizer = optimizer_of(model, bits=8)
    losses = train(model, optimizer, 0, SAVED_AFTER)
    state = optimizer.state_dict()["state"][0]
    qe.distributed.save_checkpoint(f"{folder}/eight", model, optimizer, {"step": SAVED_AFTER})
    again = make_model(sharded=True, checkpointing=False, blocksize=128)
    resumed = optimizer_of(again, bits=8)
    qe.distributed.load_checkpoint(f"{folder}/eight", again, resumed)
    for old, new in zip(trainable(model), trainable(again), strict=True):
        assert torch.equal(whole(old), whole(new))
    train(model, optimizer, SAVED_AFTER, STEPS)
    second = train(again, resumed, SAVED_AFTER, STEPS)

    torchs = make_model(sharded=True, checkpointing=False)
    adamw = torch.optim.AdamW(trainable(torchs), lr=1e-2)
    train(torchs, adamw, 0, 2)
    qe.distributed.save_checkpoint(f"{folder}/torch", torchs, adamw)
    loaded = torch.optim.AdamW(trainable(torchs), lr=1e-2)
    qe.distributed.load_checkpoint(f"{folder}/torch", torchs, loaded)
    for one, two in zip(adamw.state.values(), loaded.state.values(), strict=True):
        assert torch.equal(whole(one["exp_avg"]), whole(two["exp_avg"]))
    _check_errors(folder, model, optimizer)
    return losses, second, sorted(state), optimizer.device_bytes


def _check_errors(folder, model, optimizer):
    assert model.to("cpu") is model
    with pytest.raises(ValueError, match="sharded already"):
        qe.distributed.shard(model)
    with pytest.raises(ValueError, match="cannot be merged"):
        qe.merge(model)
    with pytest.raises(ValueError, match="cannot be saved in 4 bits"):
        qe.save_quantized(model, f"{folder}/base")
    with pytest.raises(FileNotFoundError, match="not a whole checkpoint"):
        qe.distributed.load_checkpoint(f"{folder}/nowhere", model)
    other = qe.distributed.shard(qe.prepare(llama(), qe.QLoRAConfig(r=3)))
    with pytest.raises(ValueError, match="not a checkpoint of this model"):
        qe.distributed.load_checkpoint(f"{folder}/eight", other)
    with pytest.raises(ValueError, match="not a trainable one of the model"):
        qe.distributed.save_checkpoint(f"{folder}/x", other, optimizer)
    with pytest.raises(ValueError, match=r"has no nn\.ModuleList"):
        qe.distributed.shard(torch.nn.Linear(4, 4))
    mixed = qe.prepare(llama(), qe.QLoRAConfig(r=3, modules_to_save="lm_head")).to(torch.bfloat16)
    mixed.model.layers[0].self_attn.q_proj.lora_A["default"].data = torch.zeros(3, 64)
    with pytest.raises(ValueError, match="one dtype"):
        qe.distributed.shard(mixed)


def test_eight_bit_state_and_torchs_optimizer(single, tmp_path):
    (losses, second, keys, held), _ = run_ranks(eight_bit_run, 2, str(tmp_path))
    assert losses == pytest.approx(single["losses"][:SAVED_AFTER], rel=2e-2)
    assert second == pytest.approx(single["losses"][SAVED_AFTER:], rel=5e-2)
    assert keys == ["exp_avg", "exp_avg_sq", "step"], "sharded 8-bit state is saved decoded"
    assert held > 0


def experts_run(sharded: bool) -> list[float]:
    model = qe.prepare(qwen3_moe(), qe.QLoRAConfig(r=4)).train()
    if sharded:
        qe.distributed.shard(model)
        assert all(hasattr(p, "to_local") for n, p in model.named_parameters() if n.endswith("_absmax"))
    return train(model, optimizer_of(model), 0, 2)


def test_experts_are_sharded():
    for losses in run_ranks(experts_run, 2, True):
        assert losses == pytest.approx(experts_run(False), rel=1e-5)


def test_blocks_are_the_layers():
    model = llama()
    assert find_blocks(model) == list(model.model.layers)


def test_needs_a_process_group():
    with pytest.raises(RuntimeError, match="torchrun"):
        qe.distributed.shard(llama())


def dies_in_a_step(folder: str) -> str | None:
    model = make_model(sharded=True)
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 1)
    qe.distributed.save_checkpoint(f"{folder}/last", model, optimizer, {"step": 1})
    began = time.monotonic()
    with pytest.raises(qe.distributed.PeerLost) as lost, qe.distributed.watch_peers("Go on from 'last'."):
        if dist.get_rank() == 1:
            model.model.layers[1].register_full_backward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        train(model, optimizer, 1, 3)
        qe.distributed.save_checkpoint(f"{folder}/last", model, optimizer, {"step": 3})
    with open(f"{folder}/said", "w") as file:
        json.dump([str(lost.value), time.monotonic() - began], file)


def test_a_killed_rank_ends_the_others_and_leaves_the_checkpoint(tmp_path):
    with pytest.raises(RuntimeError, match="rank"):
        run_ranks(dies_in_a_step, 2, str(tmp_path))
    sentence, seconds = json.loads((tmp_path / "said").read_text())
    assert sentence.startswith("rank 0: another process of the run has died")
    assert sentence.endswith("Go on from 'last'.")
    assert seconds < 60
    model = make_model(sharded=False)
    assert qe.distributed.load_checkpoint(tmp_path / "last", model, optimizer_of(model)) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_silent_rank_is_reported(monkeypatch):
    """One that neither dies nor answers, as NCCL would wait for."""
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.01)
    store, said, done = dist.HashStore(), [], threading.Event()
    peer = watch.Watcher(store, 1, 2, "", 60.0, said.append, done_of_peer := threading.Event())
    thread = threading.Thread(target=peer.run)
    thread.start()
    watcher = watch.Watcher(store, 0, 2, "Resume.", 0.4, said.append, done)
    observer = threading.Thread(target=watcher.run)
    observer.start()
    time.sleep(1.0)
    assert said == [], "both answer"
    monkeypatch.setattr(peer, "beat", lambda: None)
    observer.join(20)
    done_of_peer.set()
    thread.join(5)
    assert said == ["rank 0: rank 1 of the run has died or does not answer; this one ends. Resume."]


def test_one_that_finishes_is_not_silent(monkeypatch):
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.01)
    store, said, done, early = dist.HashStore(), [], threading.Event(), threading.Event()
    early.set()
    watch.Watcher(store, 1, 2, "", 60.0, said.append, early).run()
    watcher = watch.Watcher(store, 0, 2, "", 0.2, said.append, done)
    observer = threading.Thread(target=watcher.run)
    observer.start()
    time.sleep(0.6)
    done.set()
    observer.join(5)
    assert said == []


def test_dataclass_members_stay_cheap():
    """A member's local part of an ordinary parameter is the parameter itself."""
    from qlora_engine.optim.bucket import Member

    parameter = torch.nn.Parameter(torch.zeros(3))
    assert Member(parameter, 0, 0).tensor is parameter
    assert [field.name for field in dataclasses.fields(Member)] == ["param", "group", "layout"]
