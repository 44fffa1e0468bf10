"""Log-probabilities of preference data by the reference model: the 4-bit base without what is trained.

They are computed once before training and kept beside the run. Computed in each step instead they would cost a
forward pass for every pair in every epoch and every evaluation, for the same numbers; the memory is the same, since
there is no second model either way.
"""

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from qlora_engine import peft
from qlora_engine.models.adapters import adapters_disabled, evaluating
from qlora_engine.models.files import atomic_write
from qlora_engine.training.data import ANSWERS

FILE = "reference.safetensors"
COLUMN = "reference"
SAMPLED = 1024  # elements of each of the base's tensors that its digest is made from


def add_reference(trainer, folder: Path, log_probs: Callable[[dict], torch.Tensor]) -> None:
    """Gives the rows of a trainer's datasets the column `reference`: log-probabilities of chosen and rejected.

    Every process calls this, and computes its share; the first one keeps the figures in `folder`, under a digest of
    tokens and model, and takes them from there when they are asked for again.

    Args:
        trainer: with datasets as `pairs.pair_dataset` makes them.
        folder: the run's.
        log_probs: of a batch, float32 `[B, 2]`.
    """
    datasets = {"train_dataset": trainer.train_dataset, "eval_dataset": trainer.eval_dataset}
    datasets = {name: dataset for name, dataset in datasets.items() if dataset is not None}
    with base_alone(trainer.model):
        base = base_digest(trainer.model)
        digests = {name: pairs_digest(dataset, base) for name, dataset in datasets.items()}
        known = _from_first(trainer.ranks, lambda: read(folder / FILE, digests))
        found = {
            name: known[name] if name in known else compute(trainer, dataset, log_probs)
            for name, dataset in datasets.items()
        }
    if trainer.ranks.first and found.keys() != known.keys():
        with atomic_write(folder / FILE) as temporary:
            save_file(found, temporary, metadata=digests)
    for name, dataset in datasets.items():
        setattr(trainer, name, dataset.add_column(COLUMN, found[name].tolist()))


@contextlib.contextmanager
def base_alone(model: torch.nn.Module) -> Iterator[None]:
    """Within this context a model is in evaluation mode and computes what its frozen base computes."""
    with contextlib.ExitStack() as stack:
        methods = [method.disabled() for method in reversed(peft.applied(model))]
        for disabled in methods or [adapters_disabled(model)]:  # those of `prepare` are no method
            stack.enter_context(disabled)
        stack.enter_context(evaluating(model))
        yield


@torch.no_grad()
def compute(trainer, dataset, log_probs: Callable[[dict], torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of a dataset's pairs, float32 `[rows, 2]` on the CPU; processes share the work."""
    size, ranks = trainer.args.per_device_train_batch_size, trainer.ranks
    lengths = [len(row["prompt"]) + max(len(row[name]) for name in ANSWERS) for row in dataset]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # little padding; too little memory shows at once
    batches = [order[first : first + size] for first in range(0, len(order), size)][ranks.index :: ranks.size]
    found = torch.zeros(len(dataset), 2)
    if ranks.first and not sys.stderr.isatty():
        print(f"log-probabilities of {len(dataset)} pairs by the reference model", file=sys.stderr, flush=True)
    for rows in tqdm(batches, desc="reference", unit="batch", disable=not (ranks.first and sys.stderr.isatty())):
        batch = trainer.data_collator([dataset[i] for i in rows])
        found[rows] = log_probs({name: t.to(trainer.args.device) for name, t in batch.items()}).float().cpu()
    if ranks.size > 1:
        shared = found.to(trainer.args.device)
        dist.all_reduce(shared)  # each pair is 0 in all processes but one
        found = shared.cpu()
    return found


def base_digest(model: torch.nn.Module) -> str:
    """A digest of a model's tensors that are not trained: names, shapes, dtypes, and a sample of the elements."""
    found = hashlib.sha256()
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad] + list(model.named_buffers())
    for name, tensor in frozen:
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLED)]
        found.update(sample.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


def pairs_digest(dataset, base: str) -> str:
    """A digest of a dataset's tokens and of the model that reads them."""
    found = hashlib.sha256(base.encode())
    for row in dataset.with_format("numpy"):
        for name in ("prompt", *ANSWERS):
            found.update(f"{len(row[name])} ".encode())
            found.update(row[name].tobytes())
    return found.hexdigest()


def read(file: Path, digests: dict[str, str]) -> dict[str, torch.Tensor]:
    """What a file holds of the datasets with these digests; nothing where it is no such file."""
    try:
        with safe_open(file, framework="pt") as opened:
            kept = opened.metadata() or {}
            names = [name for name in opened.keys() if name in digests and kept.get(name) == digests[name]]  # noqa: SIM118
            return {name: opened.get_tensor(name) for name in names}
    except (OSError, SafetensorError):
        return {}


def _from_first(ranks, read: Callable[[], dict]) -> dict:
    """What the first process reads, in all."""
    shared = [read() if ranks.first else None]
    if ranks.size > 1:
        dist.broadcast_object_list(shared)
    return shared[0]
