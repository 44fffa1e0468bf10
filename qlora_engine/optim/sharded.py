"""Parameters that are sharded over processes (DTensors): the part that this process updates, and its state."""

import torch
import torch.distributed as dist

from qlora_engine.optim.layout import decode_8bit


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor, as the parameters of a module that `fully_shard` was called on."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):  # spares most programs the import
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: an alias of it."""
    if not is_sharded(tensor):  # asked of every parameter in every step
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def part_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The part of a whole tensor that this process holds of `like`; no message is sent."""
    from torch.distributed.tensor import distribute_tensor

    on_device = whole.detach().to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None).to_local()


def with_local(state: dict[str, torch.Tensor], param: torch.Tensor) -> dict[str, torch.Tensor]:
    """State whose tensors are local parts as state of DTensors, sharded as the parameter is."""
    from torch.distributed.tensor import DTensor

    def as_whole(name, part):
        if name == "step":
            return part
        shape, stride = param.shape, param.stride()
        return DTensor.from_local(
            part, param.device_mesh, param.placements, run_check=False, shape=shape, stride=stride
        )

    return {name: as_whole(name, part) for name, part in state.items()}


def local_state(state: dict[str, torch.Tensor], param: torch.Tensor) -> dict[str, torch.Tensor]:
    """This process's part of a saved state: of DTensors their part, of whole tensors what belongs to it."""
    if not is_sharded(param):
        return {name: value.full_tensor() if is_sharded(value) else value for name, value in state.items()}
    found = {}
    for name, value in state.items():
        if name == "step" or name.endswith("_absmax"):
            found[name] = value
        elif is_sharded(value):
            found[name] = local_part(value)
        elif name.endswith("_codes"):
            moment = name.removesuffix("_codes")
            whole = decode_8bit(value.cpu(), state[f"{moment}_absmax"].cpu(), signed=moment == "exp_avg")
            found[moment] = part_of(whole.view(param.shape), param)
        elif value.shape == param.shape:
            found[name] = part_of(value, param)
        else:
            found[name] = value
    return found


def global_norm(bucket, grads: list[torch.Tensor | None]) -> torch.Tensor:
    """The L2 norm of a bucket's gradients over all processes, float32 []."""
    if not bucket.sharded:
        return bucket.norm(grads)
    meshes: dict[tuple, list[int]] = {}
    for index, (member, grad) in enumerate(zip(bucket.members, grads, strict=True)):
        if grad is not None:
            param = member.param
            key = (param.device_mesh, tuple(param.placements)) if is_sharded(param) else ()
            meshes.setdefault(key, []).append(index)
    squares = []
    for key, chosen in meshes.items():
        among = set(chosen)
        square = bucket.norm([grad if i in among else None for i, grad in enumerate(grads)]).square()
        if key:
            mesh, placements = key
            for dim, placement in enumerate(placements):
                if placement.is_shard():
                    dist.all_reduce(square, group=mesh.get_group(dim))
        squares.append(square)
    return torch.stack(squares).sum().sqrt()
