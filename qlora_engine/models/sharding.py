"""Sharding a 4-bit model over processes with torch's `fully_shard`: bytes as bytes, one layer gathered at a time."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from qlora_engine.nn.nf4_embedding import NF4Embedding, TiedNF4Linear
from qlora_engine.nn.nf4_experts import NF4Experts
from qlora_engine.nn.nf4_linear import NF4Linear
from qlora_engine.optim.sharded import is_sharded, part_of


def shard(
    model: nn.Module,
    mesh=None,
    *,
    device: torch.device | str | None = None,
    blocks: Sequence[nn.Module] | None = None,
    reshard_after_forward: bool = True,
) -> nn.Module:
    """Shards a prepared model over processes with FSDP2 (`torch.distributed.fsdp.fully_shard`). In place.

    Every process keeps its part of each packed weight, of its block scales, of the adapters and of their gradients.
    A block's tensors are gathered just before it computes and freed behind it, in backward again; packed weights and
    8-bit scales travel as the bytes they are, a quarter of what 16-bit weights would be. Adapters' gradients are
    averaged over the processes. Make the optimizer afterwards, of the parameters that the model has then; with
    `PagedAdamW` its state is sharded as they are.

    Every process calls this with the same model, quantized from the same weights. Trainable parameters are made equal
    first: those of the first process win.

    Args:
        model: a model that `prepare` (or `quantize_model` and a method) made.
        device: where it is to train; default: where it is. With a model in host memory (`load_quantized(...,
            on_host=True)`) the device holds this process's part and one block, or what is in none, at most.
        mesh: a `torch.distributed.DeviceMesh`: of one dimension, or of two to replicate over the first and shard over
            the second; default: one over all processes.
        blocks: the modules that are gathered each by itself; default: the entries of every `nn.ModuleList` that is
            in no other and has linear layers in it, which in transformers' models are the decoder layers. The rest
            of the model, such as the head, is gathered as one, for forward and again for backward.
        reshard_after_forward: False keeps blocks gathered until backward: fewer messages, more memory.

    Returns:
        The same model.

    Raises:
        RuntimeError: where torch.distributed has not been initialised.
        ValueError: where the model is sharded already, has nothing that could be a block, or has trainable
            parameters of several dtypes in one block.
    """
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialised; start the program with torchrun and call "
            "torch.distributed.init_process_group first"
        )
    if is_sharded_model(model):
        raise ValueError("the model is sharded already; shard it once, before the optimizer is made")
    blocks = find_blocks(model) if blocks is None else list(blocks)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList of layers to shard one by one; name them with `blocks`"
        )
    for unit in (*blocks, model):
        _check_dtypes(unit)
    device = next(model.parameters()).device if device is None else torch.device(device)
    if mesh is None:
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for parameter in model.parameters():
        if parameter.requires_grad:
            sent = parameter.data.to(device)
            dist.broadcast(sent, src=0)
            parameter.data.copy_(sent)
    for layer in model.modules():
        _scales_as_parameters(layer)
    with _bytes_as_parameters():
        for unit in (*blocks, *_lone_embeddings(model), model):
            fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_after_forward)
    return model


def is_sharded_model(model: nn.Module) -> bool:
    """Whether a model's parameters are sharded over processes."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def check_whole(model: nn.Module, work: str) -> None:
    """Raises ValueError where a model is sharded, which `work` cannot deal with."""
    if is_sharded_model(model):
        raise ValueError(
            f"a sharded model cannot be {work}; save its adapter with qlora_engine.save_adapter, and load it on a "
            "model that is whole"
        )


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Entries of every `nn.ModuleList` that is in no other and has linear layers in it."""
    found, inside = [], ()
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or path.startswith(inside or ("\0",)):
            continue
        entries = [entry for entry in module if any(isinstance(m, nn.Linear) for m in entry.modules())]
        if entries:
            found += entries
            inside = (*inside, f"{path}.")
    return found


def _check_dtypes(unit: nn.Module) -> None:
    dtypes = {p.dtype for p in unit.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        raise ValueError(
            f"{type(unit).__name__} trains parameters of {', '.join(sorted(map(str, dtypes)))}; their gradients are "
            "reduced together, so give them one dtype, such as adapter_dtype=torch.float32 and .float() for modules "
            "that are trained whole"
        )


@contextlib.contextmanager
def _bytes_as_parameters() -> Iterator[None]:
    """Lets `fully_shard` of torch before 2.13 shard bytes.

    It makes each sharded parameter with nn.Parameter's default, as one that requires a gradient, and gives it the
    flag of the original only then; for bytes the first step is an error.
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13):
        yield
        return
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    class Names:
        """torch.nn, with another default in Parameter."""

        def __getattr__(self, name):
            return getattr(nn, name)

        @staticmethod
        def Parameter(data, requires_grad=None):
            return nn.Parameter(data, data.is_floating_point() if requires_grad is None else requires_grad)

    _fsdp_param.nn = Names()
    try:
        yield
    finally:
        _fsdp_param.nn = nn


def _scales_as_parameters(layer: nn.Module) -> None:
    """`fully_shard` shards parameters alone. The name in the layer, and in files, stays."""
    names = ("absmax",) if isinstance(layer, (NF4Linear, NF4Embedding)) else ()
    if isinstance(layer, NF4Experts):
        names = tuple(f"{projection}_absmax" for projection in layer.projections)
    for name in names:
        scales = layer._buffers.pop(name, None)
        if scales is not None:
            layer.register_parameter(name, nn.Parameter(scales, requires_grad=False))


def _lone_embeddings(model: nn.Module) -> list[nn.Module]:
    """Embeddings that share their weight with nothing: they need not stay gathered beside the head."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    read_by_heads = {id(m.embedding) for m in model.modules() if isinstance(m, TiedNF4Linear)}
    return [
        m
        for m in model.modules()
        if (type(m) is nn.Embedding or isinstance(m, NF4Embedding))
        and holders[id(m.weight)] == 1
        and id(m) not in read_by_heads
    ]


def writes_files(model: nn.Module) -> bool:
    """Whether this process is the one that writes what all have gathered; any is that of a model that is whole."""
    return not is_sharded_model(model) or dist.get_rank() == 0


def wait_for_files(model: nn.Module) -> None:
    """Lets no process of a sharded model go on to read a file that the first is still writing."""
    if is_sharded_model(model):
        dist.barrier()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered, by all its processes together; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def assign(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies a whole tensor into a parameter, of a sharded one into this process's part."""
    if is_sharded(target):
        target.to_local().copy_(part_of(source.to(target.dtype), target))
    else:
        target.copy_(source)


def plain_class(model: nn.Module) -> type:
    """A model's class, without the one that `fully_shard` puts in front of it."""
    kind = type(model)
    if is_sharded_model(model) and kind.__name__.startswith("FSDP") and len(kind.__bases__) == 2:
        return kind.__bases__[1]
    return kind
