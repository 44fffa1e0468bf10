"""How closely results must agree."""

import torch

# Relative RMS of a product whose factors are rounded to a dtype and accumulated in float32
RELATIVE_RMS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; inf where anything is not finite."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not torch.isfinite(actual).all():
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    norm = expected.norm()
    return float((actual - expected).norm() / norm) if norm else float(actual.norm())


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    """Relative RMS of `actual` to `expected` is within `bound`."""
    error = relative_rms(actual, expected)
    assert error <= bound, f"{name}: relative RMS {error:.2e}, allowed {bound:.0e}"
