"""The factor by which kernels multiply the levels before they round them (csrc/cuda/far_table.cuh)."""

import re
from pathlib import Path

import pytest
import torch

from qlora_engine.quantization.codebook import nf4_levels

SOURCE = Path(__file__).parents[2] / "csrc" / "cuda" / "far_table.cuh"
STEPS = 1 << 17


def errors(factors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What rounding the multiplied levels changes them by, relative to their size, in root mean squares."""
    levels = torch.tensor(nf4_levels(), dtype=torch.float32).double()
    exact = factors.unsqueeze(1) * levels
    rounded = exact.float().to(dtype).double()
    return ((rounded - exact) / factors.unsqueeze(1)).square().mean(1).sqrt() / levels.square().mean().sqrt()


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "__nv_bfloat16"), (torch.float16, "__half")])
def test_no_other_factor_loses_less(dtype, name):
    written = float(re.search(rf"kLevelFactor<{name}> = ([\d.]+)f;", SOURCE.read_text())[1])
    found = errors(1 + torch.arange(STEPS, dtype=torch.float64) / STEPS, dtype)
    own = errors(torch.tensor([written], dtype=torch.float64), dtype)
    assert 1 <= written < 2
    assert (written - 1) * STEPS == int((written - 1) * STEPS), "a step of the search, and a float32"
    assert own <= found.min() * (1 + 1e-12)
    assert own < 0.65 * found[0], "less than the levels as they are"
