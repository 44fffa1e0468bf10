"""Where A and B start."""

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from qlora_engine.peft.base import MethodError
from qlora_engine.quantization.weight import NF4Weight, quantize

INITIALISATIONS = ("kaiming", "gaussian", "both", "orthogonal", "pissa", "loftq")


@torch.no_grad()
def gaussian(A: torch.Tensor, B: torch.Tensor) -> None:
    """A normal with deviation 1 / r and B zero, as PEFT's "gaussian"."""
    A.normal_(std=1 / A.shape[0])
    B.zero_()


@torch.no_grad()
def both(A: torch.Tensor, B: torch.Tensor, sigma: float) -> None:
    """A and B normal with deviation `sigma`: the first output is not the base's."""
    A.normal_(std=sigma)
    B.normal_(std=sigma)


@torch.no_grad()
def orthogonal(A: torch.Tensor, B: torch.Tensor) -> None:
    """A and B both full, with B A = 0: the first output is the base's, and both learn from the first step.

    The rows of an orthogonal matrix `[r, r]` are divided in two sets; A lies in the span of one, B in that of the
    other. As PEFT's "orthogonal", for odd ranks as well.

    Raises:
        MethodError: where the rank is below 2.
    """
    rank = A.shape[0]
    if rank < 2:
        raise MethodError("init='orthogonal' divides the rank in two; r must be at least 2")
    basis = torch.linalg.qr(torch.randn(rank, rank, device=A.device)).Q
    one, other = basis[0::2], basis[1::2]
    rows = torch.randn(A[0].numel(), len(one), device=A.device) @ one
    columns = torch.randn(B.shape[0], len(other), device=A.device) @ other
    A.copy_(rows.T.reshape(A.shape).div(10))
    B.copy_(columns.reshape(B.shape).div(10))


@torch.no_grad()
def principal(A: torch.Tensor, B: torch.Tensor, matrix: torch.Tensor, scaling: float) -> None:
    """A and B such that `scaling * B A` is the best approximation of a matrix by their rank.

    Args:
        A: written.
        B: written.
        matrix: float32 `[out, in]`.
        scaling: factor of the product.

    Raises:
        MethodError: where the rank is larger than the matrix has.
    """
    rank = A.shape[0]
    if rank > min(matrix.shape):
        raise MethodError(f"rank {rank} is more than a weight of {list(matrix.shape)} has")
    if scaling <= 0:
        raise MethodError(f"the scaling is {scaling:g}; it must be positive to divide singular values by it")
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = (S[:rank] / scaling).sqrt()
    A.copy_((root[:, None] * Vh[:rank]).reshape(A.shape))
    B.copy_((U[:, :rank] * root).reshape(B.shape))


@torch.no_grad()
def loftq(
    A: torch.Tensor, B: torch.Tensor, weight: torch.Tensor, scaling: float, w4: NF4Weight, iterations: int
) -> NF4Weight:
    """A and B that take off what quantization lost; algorithm 1 of Li et al. 2023, "LoftQ".

    Args:
        A: written.
        B: written.
        weight: float32 `[out, in]`, before quantization.
        scaling: factor of the product.
        w4: its 4-bit weight, the first iteration's.
        iterations: alternations; each after the first quantizes `weight - scaling * B A` anew.

    Returns:
        The 4-bit weight that A and B were fitted to last.
    """
    for iteration in range(iterations):
        if iteration:
            w4 = quantize(weight - _product(A, B, scaling), w4.blocksize, w4.double_quant)
        principal(A, B, weight - w4.dequantize(torch.float32), scaling)
    return w4


@torch.no_grad()
def pissa_of_quantized(
    A: torch.Tensor, B: torch.Tensor, weight: torch.Tensor, scaling: float, w4: NF4Weight
) -> NF4Weight:
    """A and B from the largest singular vectors of a weight; Meng et al. 2024, "PiSSA", section 4 (QPiSSA).

    Returns:
        `weight - scaling * B A` in 4 bits, in the format of `w4`.
    """
    principal(A, B, weight, scaling)
    return quantize(weight - _product(A, B, scaling), w4.blocksize, w4.double_quant)


def _product(A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    return scaling * (B.flatten(1).float() @ A.flatten(1).float())


def reference_weight(reference, path: str, layer: nn.Module, transposed: bool) -> torch.Tensor:
    """A layer's weight before it was quantized: float32 `[out, in]`.

    Args:
        reference: tensors by name, such as the `state_dict` of the 16-bit model, or a folder with its safetensors.
        path: the layer's path.
        layer: the 4-bit layer.
        transposed: whether the reference has it as `[in, out]`, as transformers' Conv1D does.

    Raises:
        MethodError: where there is no such tensor, or it has another shape.
    """
    name = f"{path}.weight"
    found = reference.get(name) if isinstance(reference, Mapping) else _from_folder(reference, name)
    if found is None:
        raise MethodError(f"the reference has no tensor {name}; it must be of the model that was quantized")
    found = found.detach().to(layer.weight.device, torch.float32)
    found = found.T if transposed else found
    if tuple(found.shape) != (layer.out_features, layer.in_features):
        raise MethodError(
            f"{name} is {list(found.shape)} in the reference; "
            f"the layer is [{layer.out_features}, {layer.in_features}]"
        )
    return found


def _from_folder(folder, name: str) -> torch.Tensor | None:
    from pathlib import Path

    from safetensors import safe_open

    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise MethodError(f"{folder} has no safetensors; the reference is the folder of the model in 16 bits")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            keys = set(tensors.keys())
            for key in (name, name.partition(".")[2]):  # a file of the bare model has no "model." in front
                if key in keys:
                    return tensors.get_tensor(key)
    return None


def warn_disturbed(disturbance: float) -> None:
    """Says that the first output is not the base's."""
    warnings.warn(
        f"init='both' starts with ||dW|| / ||W|| up to {disturbance:.2e}: the first output is not the base's",
        stacklevel=4,
    )
