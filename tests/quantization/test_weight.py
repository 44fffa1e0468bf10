"""`NF4Weight`."""

import dataclasses

import pytest
import torch

import qlora_engine as qe


def test_size_and_shape():
    w4 = qe.quantize(torch.randn(512, 1024))
    assert w4.shape == (512, 1024)
    assert w4.bits_per_weight == pytest.approx(4.127, abs=1e-3)
    assert w4.nbytes == 512 * 1024 // 2 + 8192 + 32 * 4 + 4
    assert w4.double_quant
    assert not qe.quantize(torch.randn(64), double_quant=False).double_quant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decodes_to_the_dtype_that_was_quantized(dtype):
    w4 = qe.quantize(torch.randn(8, 64, dtype=dtype))
    assert w4.dequantize().dtype == dtype
    assert w4.dequantize(torch.float32).dtype == torch.float32


def test_error_of_normal_weights():
    """NF4 with blocks of 64 leaves about 9% relative RMS on normal weights; a wrong level or scale leaves more."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    error = float((qe.quantize(weight).dequantize() - weight).norm() / weight.norm())
    assert 0.08 < error < 0.10


def test_quantizing_twice_changes_nothing():
    once = qe.quantize(torch.randn(64, 64), double_quant=False).dequantize()
    twice = qe.quantize(once, double_quant=False).dequantize()
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)


def test_does_not_track_gradients():
    weight = torch.nn.Parameter(torch.randn(8, 64))
    assert not qe.quantize(weight).dequantize().requires_grad


def test_is_frozen_and_moves():
    w4 = qe.quantize(torch.randn(8, 64))
    with pytest.raises(dataclasses.FrozenInstanceError):
        w4.blocksize = 32
    moved = w4.to("meta")
    assert moved.device.type == "meta"
    assert moved.shape == w4.shape


@pytest.mark.parametrize(("scales", "double_quant"), [("search", True), ("search", False), ("signed", False)])
def test_searched_scales_lower_the_error_at_the_same_size(scales, double_quant):
    weight = torch.randn(256, 256)
    plain, searched = (qe.quantize(weight, 64, double_quant, scales=s) for s in ("absmax", scales))
    errors = [(w4.dequantize() - weight).square().mean() for w4 in (plain, searched)]
    assert errors[1] < (0.88 if scales == "search" else 0.83) * errors[0]
    assert searched.nbytes == plain.nbytes
    assert searched.absmax.dtype == plain.absmax.dtype


def test_scales_that_do_not_exist():
    weight = torch.randn(8, 64)
    with pytest.raises(ValueError, match="scales is 'best'; expected one of absmax, search, signed"):
        qe.quantize(weight, scales="best")
    with pytest.raises(ValueError, match="cannot be double-quantized"):
        qe.quantize(weight, scales="signed")
