"""Reference of `adamw_step` and `gradient_norm`: AdamW on paged state, in tensor operations."""

import math

import torch
import torch.nn.functional as F

from qlora_engine.quantization.codebook import dynamic_map, level_tensor, midpoints, unsigned_dynamic_map

STATE_BLOCK = 256
EIGHT_BIT_STATE, MASTER_COPY, STOCHASTIC_ROUNDING = 1, 2, 4  # bits of a parameter's layout
HYPERPARAMETERS = 6  # of a group: lr, beta1, beta2, eps, weight_decay, sign
SIGNED_ZERO = 127  # code of 0 in the signed map


def padded(count: int) -> int:
    """Elements that a page of `count` has room for."""
    return -(-count // STATE_BLOCK) * STATE_BLOCK


def page_bytes(count: int, layout: int) -> int:
    """Bytes of a page of `count` elements."""
    n = padded(count)
    state = 2 * n + 2 * 4 * (n // STATE_BLOCK) if layout & EIGHT_BIT_STATE else 2 * 4 * n
    return state + (4 * n if layout & MASTER_COPY else 0)


def page_views(memory: torch.Tensor, offset: int, count: int, layout: int) -> dict[str, torch.Tensor]:
    """The parts of one page, aliasing its memory.

    Args:
        memory: uint8, the slab.
        offset: byte where the page begins.
        count: elements of the page.
        layout: bits of the parameter's layout.

    Returns:
        exp_avg, exp_avg_sq: float32 `[n]`, or uint8 codes with exp_avg_absmax, exp_avg_sq_absmax float32 `[n / 256]`;
        master: float32 `[n]` where the layout has one. n is `padded(count)`.
    """
    n = padded(count)
    eight = bool(layout & EIGHT_BIT_STATE)
    parts = [("exp_avg", n, torch.uint8 if eight else torch.float32)]
    parts += [("exp_avg_sq", n, torch.uint8 if eight else torch.float32)]
    if layout & MASTER_COPY:
        parts += [("master", n, torch.float32)]
    if eight:
        parts += [(f"{name}_absmax", n // STATE_BLOCK, torch.float32) for name in ("exp_avg", "exp_avg_sq")]
    views = {}
    for name, elements, dtype in parts:
        size = elements * dtype.itemsize
        views[name] = memory[offset : offset + size].view(dtype)
        offset += size
    return views


def decode_state(codes: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    """float32 `[n]` of 8-bit codes `[n]` and the scales of their blocks."""
    levels = level_tensor(dynamic_map() if signed else unsigned_dynamic_map(), codes.device)
    return (levels[codes.long()].view(-1, STATE_BLOCK) * absmax.unsqueeze(1)).view(-1)


def encode_state(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit codes and scales of float32 `[n]`, n a multiple of 256.

    A block whose largest magnitude is below the smallest normal float32 is stored as zeros. A positive number of the
    unsigned map never becomes zero: the optimizer divides by its root.
    """
    blocks = values.view(-1, STATE_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    absmax = torch.where(absmax < torch.finfo(torch.float32).tiny, 0.0, absmax)
    scaled = torch.where(absmax.unsqueeze(1) == 0, 0.0, blocks * (1.0 / absmax).unsqueeze(1))
    if signed:
        magnitudes = level_tensor(dynamic_map()[SIGNED_ZERO:], values.device)
        level = torch.bucketize(scaled.abs(), midpoints(magnitudes))
        codes = torch.where(scaled < 0, SIGNED_ZERO - level.clamp(max=SIGNED_ZERO), SIGNED_ZERO + level)
    else:
        codes = torch.bucketize(scaled, midpoints(level_tensor(unsigned_dynamic_map(), values.device)))
        codes = torch.where((codes == 0) & (scaled > 0), 1, codes)
    return codes.to(torch.uint8).view(-1), absmax


def _mix(h: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finalizer on int64 tensors that hold 32-bit numbers; the upper 16 bits of it."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return (h ^ (h >> 16)) >> 16


def random_bits(key: int, element: torch.Tensor) -> torch.Tensor:
    """16 random bits of each element, `random_bits` of csrc/adamw.h; int64."""
    return _mix((element * 0x9E3779B9 & 0xFFFFFFFF) ^ key)


def random_key(seed: int, step: int, parameter: int) -> int:
    """What a parameter at a step is hashed with, `random_key` of csrc/adamw.h."""

    def bits(key, element):
        return int(random_bits(key, torch.tensor(element)))

    first = bits(seed, step) << 16
    return (first ^ bits(step, (parameter + seed) & 0xFFFFFFFF) ^ (parameter * 0x27D4EB2F)) & 0xFFFFFFFF


def stochastic_bfloat16(values: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """float32 to bfloat16, up or down in proportion to the distance."""
    bits = values.view(torch.int32).long() & 0xFFFFFFFF
    rounded = (bits + random & 0xFFFF0000).to(torch.uint32).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def _update(p, g, m, v, hyper, step):
    """torch.optim.AdamW's operations on float32 tensors, in place."""
    lr, beta1, beta2, eps, weight_decay, _ = hyper
    p.mul_(1 - lr * weight_decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (v.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    p.addcdiv_(m, denominator, value=-(lr / (1 - beta1**step)))


def adamw_step(
    params, grads, steps, memory, pages, cold_pages, table, multiplier, skip, hyper, groups, layouts, seed
) -> None:
    """See `qlora_engine.ops.adamw_step`."""
    if skip is not None and bool(skip):
        return
    factor = 1.0 if multiplier is None else float(multiplier)
    for index, grad in enumerate(grads):
        if grad is not None:
            steps[index] += 1
    for parameter, first, count, slab, offset in pages.tolist():
        if grads[parameter] is None:
            continue
        group = groups[parameter] * HYPERPARAMETERS
        numbers = hyper[group : group + HYPERPARAMETERS]
        layout, step = layouts[parameter], int(steps[parameter])
        views = page_views(memory[slab], offset, count, layout)
        target = params[parameter].view(-1)[first : first + count]
        g = grads[parameter].view(-1)[first : first + count].float() * (numbers[5] * factor)
        p = views["master"][:count].clone() if layout & MASTER_COPY else target.float()
        if layout & EIGHT_BIT_STATE:
            m = decode_state(views["exp_avg"], views["exp_avg_absmax"], signed=True)
            v = decode_state(views["exp_avg_sq"], views["exp_avg_sq_absmax"], signed=False)
            g, p = (F.pad(t, (0, m.numel() - count)) for t in (g, p))
            _update(p, g, m, v, numbers, step)
            m[count:], v[count:], p = 0, 0, p[:count]
            for name, values, signed in (("exp_avg", m, True), ("exp_avg_sq", v, False)):
                codes, absmax = encode_state(values, signed)
                views[name].copy_(codes)
                views[f"{name}_absmax"].copy_(absmax)
        else:
            p = p.clone() if p.data_ptr() == target.data_ptr() else p
            _update(p, g, views["exp_avg"][:count], views["exp_avg_sq"][:count], numbers, step)
        if layout & MASTER_COPY:
            views["master"][:count] = p
        if layout & STOCHASTIC_ROUNDING:
            elements = torch.arange(first, first + count, device=p.device)
            p = stochastic_bfloat16(p, random_bits(random_key(seed, step, parameter), elements))
        target.copy_(p)


def gradient_norm(grads, pages, table) -> torch.Tensor:
    """See `qlora_engine.ops.gradient_norm`."""
    present = [g for g in grads if g is not None]
    squares = [torch.linalg.vector_norm(g, dtype=torch.float32).double().square() for g in present]
    return torch.stack(squares).sum().sqrt().float() if squares else pages.new_zeros((), dtype=torch.float32)
