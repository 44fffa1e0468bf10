"""A run in two processes, replicated and sharded, against the same run in one."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launch import run_ranks
from tests.training.tiny_llm import preferences, write_jsonl

pytest.importorskip("trl")

from qlora_engine.training.errors import OptionError
from qlora_engine.training.finetune import finetune
from qlora_engine.training.options import FinetuneOptions
from qlora_engine.training.parallel import find_ranks

STEPS = 4


@pytest.fixture
def options(tiny_model, tiny_data, tmp_path):
    return FinetuneOptions(
        model=str(tiny_model),
        data=str(tiny_data),
        output=str(tmp_path / "one"),
        device="cpu",
        max_steps=STEPS,
        batch_size=4,
        r=4,
        samples=1,
        sample_tokens=3,
        gradient_checkpointing="on",
        save_every=2,
        eval_every=STEPS,
    )


def figures(folder: Path, key: str) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records if key in record]


def two_runs(options: FinetuneOptions) -> list[str]:
    """A replicated run, and a sharded one that is resumed from its middle."""
    rank, folder = torch.distributed.get_rank(), Path(options.output).parent
    shared = dataclasses.replace(options, batch_size=2, grad_accum=1)
    finetune(dataclasses.replace(shared, output=str(folder / "replicated")))
    sharded = dataclasses.replace(shared, output=str(folder / "sharded"), sharding="full")
    result = finetune(sharded)
    kinds = sorted({type(parameter).__name__ for parameter in result.model.parameters()})
    if rank == 0:
        shutil.copytree(folder / "sharded", folder / "resumed")
        shutil.rmtree(folder / "resumed" / "checkpoints" / f"checkpoint-{STEPS}")
        shutil.copytree(folder / "resumed", folder / "on one")
    torch.distributed.barrier()
    finetune(dataclasses.replace(sharded, output=str(folder / "resumed"), resume=True))
    return kinds


def test_two_processes_give_the_run_of_one(options, tmp_path):
    single = finetune(options)
    assert run_ranks(two_runs, 2, options) == [["DTensor"]] * 2
    on_one = dataclasses.replace(options, output=str(tmp_path / "on one"), resume=True)
    with pytest.raises(OptionError, match=r"a step had 2 x 1 x 2 processes sequences and has 2 x 1 x 1 processes"):
        finetune(dataclasses.replace(on_one, batch_size=2))
    finetune(on_one)
    for name in ("replicated", "sharded", "resumed", "on one"):
        folder = tmp_path / name
        for key in ("loss", "eval_loss", "grad_norm"):
            assert figures(folder, key) == pytest.approx(figures(single.output, key), rel=1e-4), (name, key)
        assert (folder / "README.md").is_file()
        mine, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, single.output))
        assert mine.keys() == theirs.keys()
        for tensor in mine:
            torch.testing.assert_close(mine[tensor], theirs[tensor], rtol=1e-3, atol=1e-5)
    assert figures(tmp_path / "resumed", "loss") == figures(tmp_path / "sharded", "loss")


def preference_runs(options: FinetuneOptions) -> None:
    """A replicated run and a sharded one on preferences."""
    folder = Path(options.output).parent
    for name, sharding in (("replicated", "none"), ("sharded", "full")):
        finetune(dataclasses.replace(options, output=str(folder / name), sharding=sharding, batch_size=2))


def test_two_processes_prefer_as_one_does(options, tmp_path):
    data = write_jsonl(tmp_path / "preferences.jsonl", preferences(30))
    changes = {"objective": "dpo", "data": str(data), "max_steps": 2, "eval_every": 2, "save_every": 0, "samples": 0}
    single = dataclasses.replace(options, **changes)
    finetune(single)
    run_ranks(preference_runs, 2, single)
    kept = load_file(Path(single.output) / "reference.safetensors")
    for name in ("replicated", "sharded"):
        folder = tmp_path / name
        for key in ("loss", "eval_loss", "grad_norm", "tokens", "rewards/margins", "eval_rewards/chosen"):
            expected, got = figures(Path(single.output), key), figures(folder, key)
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-5), (name, key)
        for dataset, expected in kept.items():
            found = load_file(folder / "reference.safetensors")[dataset]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_accelerate_launch(options, tmp_path):
    """Its launcher for several GPUs, with its FSDP flags, on CPUs: a sharded run with the losses of one process.

    With embeddings and head in 4 bits, of which TRL's loss asks for the head within the sharded forward.
    """
    short = dataclasses.replace(options, max_steps=2, eval_fraction=0.0, samples=0, save_every=0)
    short = dataclasses.replace(short, quantize_embeddings=True, quantize_head=True)
    single = finetune(short)
    launched = dataclasses.replace(short, batch_size=2, output=str(tmp_path / "launched"))
    (tmp_path / "run.yaml").write_text(launched.to_yaml())
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["--use_fsdp", "--fsdp_version", "2", "-m", "qlora_engine.cli.main", "finetune"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [*command, "--config", str(tmp_path / "run.yaml")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("training loss") == 1, "the first process speaks"
    folder = tmp_path / "launched"
    assert json.loads((folder / "before.json").read_text())["ranks"] == 2
    assert figures(folder, "loss") == pytest.approx(figures(single.output, "loss"), rel=1e-4)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sharding": "full"}, "needs several processes"),
        ({"sharding": "full", "method": "ia3"}, "--method lora"),
        ({"sharding": "full", "dtype": "fp16"}, "bf16 or fp32"),
    ],
)
def test_what_cannot_be_sharded_is_said(options, monkeypatch, changes, message):
    if "needs" not in message:
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match=message):
        find_ranks(dataclasses.replace(options, **changes))


def test_accelerate_launch_with_fsdp_shards_by_this_engine(options, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    ranks = find_ranks(options)
    assert (ranks.index, ranks.size, ranks.local, ranks.sharded, ranks.first) == (3, 4, 1, True, False)
    assert "ACCELERATE_USE_FSDP" not in os.environ, "Trainer would shard once more"
    assert not find_ranks(dataclasses.replace(options, sharding="none")).sharded
    with pytest.raises(OptionError, match="expected auto, cuda or cpu"):
        ranks.device_name("cuda:1")
