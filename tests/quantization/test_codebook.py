"""The derived levels equal the published ones, and the compiled code has the same."""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from qlora_engine.quantization.codebook import (
    bits_per_weight,
    dynamic_map,
    fp4_levels,
    int4_levels,
    levels_of,
    midpoints,
    nf4_levels,
    unsigned_dynamic_map,
)

# Dettmers et al. 2023, "QLoRA", appendix E
PUBLISHED_NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
CSRC = Path(__file__).parents[2] / "csrc"


def compiled_float(text: str) -> np.float32:
    """A decimal as a C++ compiler rounds it to float32: once. By way of float64, numbers that lie just beside the
    middle of two float32 values can end on the wrong side."""
    near = np.float32(text)
    candidates = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    return min(candidates, key=lambda value: abs(Fraction(text) - Fraction(float(value))))


def floats_of_macro(file: str, macro: str) -> np.ndarray:
    text = (CSRC / file).read_text().split(f"#define {macro}", 1)[1]
    body = re.match(r"(?:.*\\\n)*.*\n", text).group(0).replace("\\", " ")
    return np.array([compiled_float(v) for v in re.findall(r"-?\d+\.\d+(?:e[+-]?\d+)?(?=f)", body)])


def test_nf4_levels_equal_the_published_ones():
    assert list(nf4_levels()) == PUBLISHED_NF4


def test_compiled_code_has_the_same_levels():
    assert floats_of_macro("nf4.h", "QLORA_NF4_LEVELS").tolist() == np.float32(nf4_levels()).tolist()
    expected = midpoints(torch.tensor(nf4_levels())).numpy()
    assert floats_of_macro("nf4.h", "QLORA_NF4_MIDPOINTS").tolist() == expected.tolist()
    # those of bitsandbytes' CUDA kernels: nearest to the exact midpoints, where the float32 sum rounds a tie to even
    thresholds = floats_of_macro("nf4.h", "QLORA_NF4_THRESHOLDS")
    assert np.flatnonzero(thresholds != expected).tolist() == [0, 8, 12, 14]
    np.testing.assert_array_max_ulp(thresholds, expected, maxulp=1)
    assert floats_of_macro("dynamic_map.h", "QLORA_DYNAMIC_MAP").tolist() == np.float32(dynamic_map()).tolist()
    unsigned = floats_of_macro("dynamic_code.h", "QLORA_UNSIGNED_DYNAMIC_MAP")
    assert unsigned.tolist() == np.float32(unsigned_dynamic_map()).tolist()


def test_levels_equal_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    assert list(dynamic_map()) == functional.create_dynamic_map().tolist()
    assert list(unsigned_dynamic_map()) == functional.create_dynamic_map(signed=False).tolist()
    fp4 = sorted(set(functional.get_4bit_type("fp4", device="cpu").tolist()))
    np.testing.assert_allclose(fp4_levels(), fp4, atol=1e-7)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4"])
def test_levels_rise_from_minus_one_to_one(name):
    levels = levels_of(name)
    assert len(levels) in (15, 16)
    assert (levels[0], levels[-1]) == (-1.0, 1.0)
    assert 0.0 in levels
    assert list(levels) == sorted(set(levels))


def test_nf4_loses_less_than_int4_and_fp4_on_normal_weights():
    from qlora_engine.reference.quantize import quantize_codes

    weight = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    errors = {}
    for name in ("nf4", "fp4", "int4"):
        levels = torch.tensor(levels_of(name))
        codes, absmax = quantize_codes(weight, 64, levels)
        errors[name] = float((levels[codes] * absmax.repeat_interleave(64) - weight).square().mean())
    assert errors["nf4"] < errors["int4"]
    assert errors["nf4"] < errors["fp4"]


def test_unknown_format():
    with pytest.raises(ValueError, match="nf4, fp4, int4"):
        levels_of("nf5")


def test_bits_per_weight():
    assert bits_per_weight(64, True) == pytest.approx(4.126953125)
    assert len(int4_levels()) == 15
