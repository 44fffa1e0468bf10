"""How a parameter's elements are ordered in memory, and the 8-bit form of its state in CPU memory."""

import torch
import torch.nn.functional as F

from qlora_engine.reference.adamw import STATE_BLOCK, decode_state, encode_state, padded


def memory_order(tensor: torch.Tensor) -> list[int]:
    """Dimensions from the widest stride to the narrowest."""
    return sorted(range(tensor.dim()), key=lambda d: (-tensor.stride(d), d))


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in any order of dimensions.

    >>> is_dense(torch.zeros(4, 6).T), is_dense(torch.zeros(4, 6)[:, ::2]), is_dense(torch.zeros(1).expand(3))
    (True, False, False)
    """
    return tensor.is_contiguous() or tensor.permute(memory_order(tensor)).is_contiguous()


def flat_view(tensor: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """The elements in the order in which `like` (default: the tensor itself) keeps them in memory.

    Contiguous and aliasing the tensor where it is laid out as `like` is.
    """
    like = tensor if like is None else like
    if like.is_contiguous():
        return tensor
    return tensor.permute(memory_order(like))


def logical_shape(flat: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `flat_view`: elements in the order of `like`'s memory as a tensor of its shape."""
    if like.is_contiguous():
        return flat.view(like.shape)
    order = memory_order(like)
    inverse = sorted(range(like.dim()), key=order.__getitem__)
    return flat.view([like.shape[d] for d in order]).permute(inverse)


def decode_8bit(codes: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    """float32 `[n]` of codes `[n]` and one scale for every 256 of them."""
    count = codes.numel()
    return decode_state(F.pad(codes, (0, padded(count) - count)), absmax, signed)[:count]


def encode_8bit(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `[n]` of float32 values of any shape, and one scale for every 256 of them."""
    flat = values.reshape(-1)
    codes, absmax = encode_state(F.pad(flat, (0, -flat.numel() % STATE_BLOCK)), signed)
    return codes[: flat.numel()], absmax
