"""Checkpoints that every process writes its part of, and that any number of processes reads."""

import contextlib
import json
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from qlora_engine.models.files import atomic_directory
from qlora_engine.optim.sharded import is_sharded

STATE_FILE = "state.json"
FORMAT = 1


def save_checkpoint(
    directory: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    extra: dict | None = None,
) -> Path:
    """Saves what a run has learnt and its optimizer's state, with `torch.distributed.checkpoint`.

    All processes call this; each writes what it holds of trainable parameters and of their state, and nothing of the
    frozen base. The folder appears, or takes the place of an older one, when all have written: a process that dies
    before leaves the older one as it was. `load_checkpoint` reads it on any number of processes, or without any.

    Args:
        directory: the checkpoint's folder.
        model: a model, sharded or whole.
        optimizer: of its trainable parameters; its state is tensors, as in `PagedAdamW` and torch's AdamW.
        extra: what else is to be kept, such as the step; anything that JSON can hold.

    Raises:
        ValueError: where the optimizer has a parameter that is not the model's.
    """
    import torch.distributed.checkpoint as dcp

    tensors, groups = _tensors(model), []
    if optimizer is not None:
        state, groups = _optimizer_state(model, optimizer)
        tensors |= state
    several = dist.is_initialized() and dist.get_world_size() > 1
    first = not several or dist.get_rank() == 0
    with atomic_directory(directory) if first else contextlib.nullcontext() as folder:
        agreed = [folder]
        if several:
            dist.broadcast_object_list(agreed, src=0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # by no_dist, on purpose
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(agreed[0]), no_dist=not several)
        if first:
            content = {"format": FORMAT, "groups": groups, "extra": extra or {}}
            Path(folder, STATE_FILE).write_text(json.dumps(content, indent=1) + "\n")
    if several:
        dist.barrier()
    return Path(directory)


def load_checkpoint(
    directory: str | os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict:
    """Reads what `save_checkpoint` wrote into a model and its optimizer, sharded over as many processes as there are.

    Args:
        directory: the checkpoint's folder.
        model: the model, with the same trainable parameters.
        optimizer: one over the same parameters, made for the model as it is now.

    Returns:
        `extra` of `save_checkpoint`.

    Raises:
        FileNotFoundError: where there is no such checkpoint, or it was cut short.
        ValueError: where its parameters are not the model's, or it has no state for the optimizer.
    """
    import torch.distributed.checkpoint as dcp

    folder = Path(directory)
    if not (folder / STATE_FILE).is_file() or not (folder / ".metadata").is_file():
        raise FileNotFoundError(f"{folder} is not a whole checkpoint: {STATE_FILE} or .metadata is missing in it")
    content = json.loads((folder / STATE_FILE).read_text())
    reader = dcp.FileSystemReader(folder)
    saved = {
        name: entry for name, entry in reader.read_metadata().state_dict_metadata.items() if hasattr(entry, "size")
    }
    parameters = _trainable(model)
    _check_fit(folder, saved, parameters, optimizer)
    wanted = {}
    for name, entry in saved.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer" and optimizer is None:
            continue
        parameter = parameters[rest.rpartition("/")[0] if kind == "optimizer" else rest]
        wanted[name] = _like(parameter, entry)
    several = dist.is_initialized() and dist.get_world_size() > 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(wanted, storage_reader=reader, no_dist=not several)
    for name, parameter in parameters.items():
        source = wanted[f"model/{name}"]
        with torch.no_grad():
            parameter.copy_(source)
    if optimizer is not None:
        _load_optimizer(optimizer, parameters, wanted, content["groups"])
    return content["extra"]


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"model/{name}": parameter.detach() for name, parameter in _trainable(model).items()}


def _optimizer_state(model: nn.Module, optimizer) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """State by the parameters' names, and the groups without their parameters."""
    names = {id(parameter): name for name, parameter in _trainable(model).items()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strangers = [tuple(parameter.shape) for parameter in order if id(parameter) not in names]
    if strangers:
        raise ValueError(
            f"the optimizer has a parameter of shape {strangers[0]} that is not a trainable one of the model; make "
            "it after the model has been sharded"
        )
    whole = optimizer.state_dict()
    tensors = {}
    for index, parameter in enumerate(order):
        for key, value in whole["state"].get(index, {}).items():
            tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
            tensors[f"optimizer/{names[id(parameter)]}/{key}"] = tensor
    groups = [
        {key: _plain(value) for key, value in group.items() if key != "params"} for group in whole["param_groups"]
    ]
    return tensors, groups


def _plain(value):
    return value.item() if isinstance(value, torch.Tensor) else value


def _like(parameter: torch.Tensor, entry) -> torch.Tensor:
    """An empty tensor for a saved one: sharded as the parameter is where it has its shape, else whole."""
    if is_sharded(parameter) and entry.size == parameter.shape:
        from torch.distributed.tensor import zeros

        return zeros(
            *entry.size,
            dtype=entry.properties.dtype,
            device_mesh=parameter.device_mesh,
            placements=parameter.placements,
        )
    device = "cpu" if is_sharded(parameter) else parameter.device
    return torch.empty(entry.size, dtype=entry.properties.dtype, device=device)


def _check_fit(folder: Path, saved, parameters: dict[str, torch.Tensor], optimizer) -> None:
    held = {name.removeprefix("model/"): tuple(entry.size) for name, entry in saved.items() if name[:6] == "model/"}
    own = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if held != own:
        odd = sorted(held.items() ^ own.items())[0][0]
        raise ValueError(
            f"{folder} is not a checkpoint of this model: {odd} is {held.get(odd, 'not there')} in it and "
            f"{own.get(odd, 'no trainable parameter')} here"
        )
    if optimizer is not None and not any(name.startswith("optimizer/") for name in saved):
        raise ValueError(f"{folder} holds no optimizer's state; load it without one")


def _load_optimizer(optimizer, parameters, tensors, groups: list[dict]) -> None:
    names = {id(parameter): name for name, parameter in parameters.items()}
    state, indices, count = {}, [], 0
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            name, _, leaf = key.removeprefix("optimizer/").rpartition("/")
            by_name.setdefault(name, {})[leaf] = tensor
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the saved optimizer has {len(groups)} groups of parameters, this {len(optimizer.param_groups)}"
        )
    for group in optimizer.param_groups:
        indices.append(list(range(count, count + len(group["params"]))))
        for index, parameter in zip(indices[-1], group["params"], strict=True):
            found = by_name.get(names.get(id(parameter), ""))
            if found:
                state[index] = found
        count += len(group["params"])
    merged = [
        {**{k: v for k, v in own.items() if k != "params"}, **saved, "params": chosen}
        for own, saved, chosen in zip(optimizer.param_groups, groups, indices, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": merged})
