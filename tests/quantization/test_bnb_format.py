"""bitsandbytes' files of 4-bit weights, against bitsandbytes itself."""

import pytest
import torch

import qlora_engine as qe
from qlora_engine.quantization.bnb_format import decode_fp4, from_bitsandbytes, to_bitsandbytes

functional = pytest.importorskip("bitsandbytes").functional


def decoded(packed, state):
    """bitsandbytes' weight: its codes and scales, multiplied here where its CPU kernel fails.

    That one (0.50.2) is right only where the columns are a multiple of the block.
    """
    if state.shape[1] % state.blocksize == 0:
        return functional.dequantize_4bit(packed, state)
    absmax = (
        functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    )
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1)[: state.shape.numel()]
    scales = absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    return (state.code[codes.long()] * scales).view(state.shape).to(state.dtype)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("shape", "blocksize"), [((64, 192), 64), ((300, 128), 128), ((33, 65), 64)])
def test_both_directions(shape, blocksize, double_quant):
    weight = torch.randn(shape).bfloat16()
    packed, state = functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4"
    )
    w4 = from_bitsandbytes("w", packed, state.as_dict(packed=True))
    assert torch.equal(w4.dequantize(), decoded(packed, state))
    assert w4.dtype == torch.bfloat16

    ours = qe.quantize(weight, blocksize, double_quant)
    tensors = to_bitsandbytes(ours)
    rest = {key.removeprefix("."): tensor for key, tensor in tensors.items() if key}
    theirs = functional.QuantState.from_dict(dict(rest), torch.device("cpu"))
    assert torch.equal(decoded(tensors[""], theirs), ours.dequantize())
    again = from_bitsandbytes("w", tensors[""], rest)
    assert torch.equal(again.packed, ours.packed)
    assert torch.equal(again.dequantize(), ours.dequantize())


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_bytes_stored_as_floats(storage):
    packed, state = functional.quantize_4bit(torch.randn(64, 64), quant_type="nf4", quant_storage=storage)
    w4 = from_bitsandbytes("w", packed, state.as_dict(packed=True))
    assert torch.equal(w4.dequantize(), functional.dequantize_4bit(packed, state))


def test_errors():
    packed, state = functional.quantize_4bit(torch.randn(64, 64), quant_type="nf4", compress_statistics=True)
    rest = state.as_dict(packed=True)
    with pytest.raises(ValueError, match="sizes"):
        from_bitsandbytes("w", packed[:-1], rest)
    with pytest.raises(ValueError, match="quant_state"):
        from_bitsandbytes("w", packed, {k: v for k, v in rest.items() if "quant_state" not in k})
    with pytest.raises(ValueError, match="other values"):
        from_bitsandbytes("w", packed, rest | {"quant_map": rest["quant_map"] * 2})
    with pytest.raises(ValueError, match="JSON"):
        from_bitsandbytes("w", packed, rest | {"quant_state.bitsandbytes__nf4": torch.full((3,), 255).byte()})
    packed, state = functional.quantize_4bit(torch.randn(64, 64), quant_type="fp4")
    with pytest.raises(ValueError, match="fp4"):
        from_bitsandbytes("w", packed, state.as_dict(packed=True))
    with pytest.raises(ValueError, match="its quant_map"):
        decode_fp4("w", packed, state.as_dict(packed=True) | {"quant_map": rest["quant_map"]})
    with pytest.raises(ValueError, match="expected 'fp4'"):
        decode_fp4("w", packed, rest)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("shape", "blocksize"), [((64, 192), 64), ((300, 128), 128), ((33, 65), 64)])
def test_fp4(shape, blocksize, double_quant):
    packed, state = functional.quantize_4bit(
        torch.randn(shape).bfloat16(), blocksize=blocksize, compress_statistics=double_quant, quant_type="fp4"
    )
    assert torch.equal(decode_fp4("w", packed, state.as_dict(packed=True)), decoded(packed, state))
