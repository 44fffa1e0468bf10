"""How closely results must agree."""

import torch

# Relative RMS of a product whose factors are rounded to a dtype and accumulated in float32
RELATIVE_RMS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def relative_rms(actual: torch.Tensor, expected: torch.Tensor, size: torch.Tensor | None = None) -> float:
    """||actual - expected|| / ||size|| in float64, `size` being `expected` unless given; inf where not finite."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not torch.isfinite(actual).all():
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    norm = expected.norm() if size is None else size.detach().double().cpu().norm()
    return float((actual - expected).norm() / norm) if norm else float(actual.norm())


def size_of_sums(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """How large the sums of `x @ weight` are before their terms cancel: what rounding errors are relative to."""
    return (x.double().square() @ weight.double().square()).sqrt()


def assert_close(
    name: str, actual: torch.Tensor, expected: torch.Tensor, bound: float, size: torch.Tensor | None = None
) -> None:
    """Relative RMS of `actual` to `expected` is within `bound`."""
    error = relative_rms(actual, expected, size)
    assert error <= bound, f"{name}: relative RMS {error:.2e}, allowed {bound:.0e}"
