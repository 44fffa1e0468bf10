"""bitsandbytes' files of 4-bit weights: the tensors of one weight there <-> `NF4Weight`. Needs no bitsandbytes.

A weight named `W` is there

    W                                      uint8 [ceil(n / 2), 1], two codes a byte, the first in the high nibble
    W.absmax                               float32 [blocks], or uint8 [blocks] where double-quantized
    W.quant_map                            float32 [16], the levels
    W.nested_absmax, W.nested_quant_map    float32 [ceil(blocks / 256)] and [256], where double-quantized
    W.quant_state.bitsandbytes__nf4        uint8, JSON in UTF-8: shape, dtype, block sizes, nested_offset

(`QuantState.as_dict` of bitsandbytes 0.50). The bytes and scales are this package's own, so nothing is computed.
"""

import json
import math
from collections.abc import Mapping

import torch

from qlora_engine.quantization.codebook import (
    NESTED_BLOCKSIZE,
    blocks_of,
    dynamic_map,
    fp4_levels,
    level_tensor,
    nf4_levels,
)
from qlora_engine.quantization.weight import NF4Weight

STATE_KEY = "quant_state.bitsandbytes__"
SUFFIXES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{STATE_KEY}nf4", f"{STATE_KEY}fp4")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def to_bitsandbytes(w4: NF4Weight) -> dict[str, torch.Tensor]:
    """The tensors of a weight in bitsandbytes' files.

    Returns:
        What follows the weight's name there -> tensor; "" is the packed weight itself.
    """
    device = w4.device
    state = {
        "quant_type": "nf4",
        "blocksize": w4.blocksize,
        "dtype": str(w4.dtype).removeprefix("torch."),
        "shape": list(w4.shape),
    }
    tensors = {
        "": w4.packed.detach().view(-1, 1),
        ".absmax": w4.absmax,
        ".quant_map": level_tensor(nf4_levels(), device).clone(),
    }
    if w4.double_quant:
        state |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": float(w4.nested_offset),
        }
        tensors[".nested_absmax"] = w4.nested_absmax
        tensors[".nested_quant_map"] = level_tensor(dynamic_map(), device).clone()
    text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors | {f".{STATE_KEY}nf4": text.to(device)}


def from_bitsandbytes(name: str, packed: torch.Tensor, rest: Mapping[str, torch.Tensor]) -> NF4Weight:
    """An NF4 weight read from bitsandbytes' files; nothing is copied.

    Args:
        name: the weight's name, for messages.
        packed: the packed weight, in any dtype that bitsandbytes stores it as (`bnb_4bit_quant_storage`).
        rest: what follows the name in the files (without the leading dot) -> tensor.

    Raises:
        ValueError: where the tensors do not fit together, or the weight is not NF4, or its levels or scales are
            others than bitsandbytes' own.
    """
    state = read_state(name, rest)
    if state["quant_type"] != "nf4":
        raise ValueError(
            f"{name} is stored as {state['quant_type']!r}; only nf4 can be loaded as 4-bit weights here. Load fp4, "
            "decoded, by from_pretrained with qlora_engine.integrations.transformers.bitsandbytes_config"
        )
    weight = _read_weight(name, state, packed, rest)
    _check_levels(name, "quant_map", rest.get("quant_map"), nf4_levels())
    return weight


def decode_fp4(name: str, packed: torch.Tensor, rest: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The decoded values of an FP4 weight of bitsandbytes' files, in the dtype that was quantized.

    Args:
        name, packed, rest: as in `from_bitsandbytes`.

    Raises:
        ValueError: likewise, for FP4.
    """
    state = read_state(name, rest)
    if state["quant_type"] != "fp4":
        raise ValueError(f"{name} is stored as {state['quant_type']!r}; expected 'fp4'")
    weight = _read_weight(name, state, packed, rest)
    levels = rest.get("quant_map")
    found = None if levels is None or levels.shape != (16,) else torch.unique(levels.float().cpu() + 0.0)
    _check_levels(name, "quant_map", found, fp4_levels())
    scales = weight.absmax
    if weight.double_quant:
        groups = weight.nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: scales.numel()]
        scales = level_tensor(dynamic_map(), scales.device)[scales.long()] * groups + weight.nested_offset
    # a byte is two values, the first in its high nibble
    pairs = torch.stack([levels.float().repeat_interleave(16), levels.float().repeat(16)], dim=1)
    values = pairs[weight.packed.int()].view(-1)[: math.prod(weight.shape)]
    values = values * scales.repeat_interleave(weight.blocksize)[: values.numel()]
    return values.view(weight.shape).to(weight.dtype)


def _read_weight(name: str, state: Mapping, packed: torch.Tensor, rest: Mapping[str, torch.Tensor]) -> NF4Weight:
    """The parts of a weight of either kind, checked but for its levels."""
    try:
        shape = tuple(int(n) for n in state["shape"])
        dtype, absmax = DTYPES[state["dtype"]], rest["absmax"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: its bitsandbytes quant_state is incomplete: {error!r}") from error
    blocksize, offset = state["blocksize"], state.get("nested_offset")
    packed = packed.contiguous().view(-1).view(torch.uint8)
    blocks = blocks_of(math.prod(shape), blocksize)
    expected = {"weight": math.ceil(math.prod(shape) / 2), "absmax": blocks}
    got = {"weight": packed.numel(), "absmax": absmax.numel()}
    nested_absmax = nested_offset = None
    if "nested_absmax" in rest:
        if state.get("nested_blocksize") != NESTED_BLOCKSIZE or not isinstance(offset, int | float):
            raise ValueError(
                f"{name}: its scales have blocks of {state.get('nested_blocksize')} and the offset {offset!r}; "
                f"expected blocks of {NESTED_BLOCKSIZE} and a number"
            )
        nested_absmax = rest["nested_absmax"].float()
        nested_offset = torch.tensor(float(offset), dtype=torch.float32, device=packed.device)
        expected["nested_absmax"], got["nested_absmax"] = blocks_of(blocks, NESTED_BLOCKSIZE), nested_absmax.numel()
        _check_levels(name, "nested_quant_map", rest.get("nested_quant_map"), dynamic_map())
    if got != expected:
        raise ValueError(f"{name}: sizes {got} do not fit the shape {list(shape)}; expected {expected}")
    if absmax.dtype != (torch.uint8 if nested_absmax is not None else torch.float32):
        raise ValueError(f"{name}: its absmax is {absmax.dtype}; expected uint8 if nested, else float32")
    return NF4Weight(packed, absmax.view(-1), nested_absmax, nested_offset, shape, blocksize, dtype)


def read_state(name: str, rest: Mapping[str, torch.Tensor]) -> dict:
    """The settings of a weight in bitsandbytes' files.

    Args:
        name, rest: as in `from_bitsandbytes`; of the rest, its `quant_state` alone is looked at.

    Raises:
        ValueError: where there is none, it is not readable, or the weight is neither NF4 nor FP4.
    """
    texts = [tensor for key, tensor in rest.items() if key.startswith(STATE_KEY)]
    if len(texts) != 1:
        raise ValueError(f"{name} has {len(texts)} tensors {STATE_KEY}...; expected one")
    try:
        state = json.loads(bytes(texts[0].cpu().tolist()).decode())
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: its bitsandbytes quant_state is not readable JSON: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("blocksize"), int):
        raise ValueError(f"{name}: its bitsandbytes quant_state is {state!r}; expected settings with a blocksize")
    if state.get("quant_type") not in ("nf4", "fp4"):
        raise ValueError(f"{name} is stored as {state.get('quant_type')!r}; expected 'nf4' or 'fp4'")
    return state


def _check_levels(name: str, what: str, levels: torch.Tensor | None, expected: tuple[float, ...]) -> None:
    if levels is None or levels.shape != (len(expected),):
        raise ValueError(f"{name}: its {what} is missing, or has not {len(expected)} values")
    if not torch.equal(levels.float().cpu(), torch.tensor(expected, dtype=torch.float32)):
        raise ValueError(f"{name}: its {what} has other values than bitsandbytes' own; it cannot be decoded here")
