"""A run in several processes, as torchrun and accelerate launch start them: replicated (DDP) or sharded (FSDP2)."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from qlora_engine.training.errors import OptionError, UsageError
from qlora_engine.training.options import LORA, FinetuneOptions

STATE_FOLDER = "distributed"  # of a checkpoint: what every process wrote its part of
SCHEDULER_FILE, OPTIMIZER_FILE = "scheduler.pt", "optimizer.pt"  # transformers' names
ACCELERATE_FSDP = "ACCELERATE_USE_FSDP"


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    Attributes:
        index: of this one.
        size: how many there are.
        local: index of this one on its machine, which is that of its GPU.
        sharded: whether the model is sharded over them; else each has a whole one.
    """

    index: int = 0
    size: int = 1
    local: int = 0
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Whether this process writes the run's files and speaks to the user."""
        return self.index == 0

    def device_name(self, name: str) -> str:
        """What `--device` means in this process.

        Raises:
            OptionError: for one GPU by its number, which all processes would share.
        """
        if self.size > 1 and name == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = (
                ""  # accelerate's barrier takes the GPU of a process's number otherwise
            )
        if self.size == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return name
        if name not in ("auto", "cuda"):
            raise OptionError(f"--device {name} with {self.size} processes; expected auto, cuda or cpu")
        torch.cuda.set_device(self.local)
        return f"cuda:{self.local}"

    def barrier(self) -> None:
        """Waits for the others."""
        if self.size > 1:
            dist.barrier()


def find_ranks(options: FinetuneOptions) -> Ranks:
    """The processes that the launcher's environment speaks of, and what `--sharding` makes of them.

    Raises:
        OptionError: where a sharded run is asked for that there cannot be.
    """
    index, size, local = (int(os.environ.get(name, default)) for name, default in _ENVIRONMENT)
    # this engine shards by itself: accelerate would cast the model's parts and save it whole
    asked_by_launcher = os.environ.pop(ACCELERATE_FSDP, "").lower() in ("1", "true", "yes")
    sharded = options.sharding == "full" or (options.sharding == "auto" and asked_by_launcher and size > 1)
    if sharded and size == 1:
        raise OptionError("--sharding full needs several processes; start with torchrun or accelerate launch")
    if sharded and options.method != LORA:
        raise OptionError(f"--sharding full is for --method lora; {options.method} can train with --sharding none")
    if sharded and options.dtype == "fp16":
        raise OptionError("--sharding full cannot scale gradients as fp16 needs; pass --dtype bf16 or fp32")
    return Ranks(index, size, local, sharded)


_ENVIRONMENT = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))


def training_arguments(ranks: Ranks, on_gpu: bool) -> dict:
    """TrainingArguments of a run in several processes."""
    if ranks.size == 1:
        return {}
    return {
        "ddp_backend": "nccl" if on_gpu else "gloo",
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,  # they are the base's scales, which nothing changes
    }


@contextlib.contextmanager
def end_with_peers(ranks: Ranks, advice: str) -> Iterator[None]:
    """Ends this process with a sentence when another one has died; see `qlora_engine.distributed.watch_peers`."""
    from qlora_engine.models.watch import PeerLost, watch_peers

    if ranks.size == 1:
        yield
        return
    try:
        with watch_peers(advice):
            yield
    except PeerLost as error:
        raise UsageError(str(error)) from error


def agree(ranks: Ranks, asked: bool) -> bool:
    """Whether any process asks; all of them call this."""
    if ranks.size == 1:
        return asked
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    votes = torch.tensor([float(asked)], device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes)


def is_first() -> bool:
    """Whether this process is the one that speaks to the user."""
    return int(os.environ.get("RANK", 0)) == 0


def leave() -> None:
    """Takes leave of the other processes at the end of a program."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class ParallelTraining:
    """What a Trainer does otherwise in several processes; a mixin in front of one.

    Attributes:
        ranks: the processes.
    """

    ranks = Ranks()

    def prepare_parallel(self) -> None:
        """To be called before the optimizer is made: shards the model, or has it wrapped to replicate it."""
        if self.ranks.size == 1:
            return
        # an evaluation before training marks the model as wrapped already, and its gradients would stay apart
        self.model.__dict__.pop("_is_accelerate_prepared", None)
        self.accelerator._models.clear()
        if self.ranks.sharded:
            from qlora_engine.models.sharding import shard

            shard(self.model)
            self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
            self.accelerator.clip_grad_norm_ = _clip_sharded

    def save_model(self, output_dir=None, _internal_call=False):
        if self.ranks.sharded:  # gathered by all, where some versions of transformers would ask the first alone
            return self._save(output_dir)
        return super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self.ranks.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        from qlora_engine.models.distributed_checkpoint import save_checkpoint

        save_checkpoint(Path(output_dir, STATE_FOLDER), self.model, _inner(self.optimizer))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint):
        whole = None if checkpoint is None else Path(checkpoint, STATE_FOLDER)
        if whole is None or not (whole.is_dir() or self.ranks.sharded):
            return super()._load_optimizer_and_scheduler(checkpoint)
        optimizer = _inner(self.optimizer)
        if whole.is_dir():
            from qlora_engine.models.distributed_checkpoint import load_checkpoint

            load_checkpoint(whole, self.model, optimizer)
        else:
            _load_whole_state(Path(checkpoint, OPTIMIZER_FILE), optimizer)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_FILE), weights_only=True))


def _load_whole_state(file: Path, optimizer: torch.optim.Optimizer) -> None:
    """The state of a run that was not sharded, into a sharded optimizer."""
    from qlora_engine.optim import PagedAdamW

    if not isinstance(optimizer, PagedAdamW):
        raise OptionError(
            "--resume: a run that was not sharded goes on sharded with --optimizer paged_adamw alone; pass "
            "--sharding none"
        )
    optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))


def _inner(optimizer):
    return getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper holds it there


def _clip_sharded(parameters, max_norm, norm_type=2):
    """Clips to the norm over all processes, and returns it as a plain tensor."""
    from qlora_engine.models.sharding import whole

    return whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type))
