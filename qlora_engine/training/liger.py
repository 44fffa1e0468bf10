"""RMSNorm and rotary embeddings by liger-kernel, in one model's modules: `use_liger`, undone by `remove_liger`.

transformers' own are four to ten elementwise kernels each, bound by bytes; liger's are one. Classes and modules of
transformers are left alone, so other models in the process do not change. Which variant of a norm a module is, and
whether an attention rotates as liger does, is decided by numbers.
"""

import importlib.util
import types
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

ROTARY = "apply_rotary_pos_emb"  # the name in every file of transformers that has it
# (added to the weight, where it casts): Llama's, Gemma's, and norms that multiply in float32 without Gemma's offset
NORM_VARIANTS = ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma"))
PROBE_ROWS = 4
PROBE_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative RMS


class LigerUse(NamedTuple):
    """How many modules of a model run liger's kernels."""

    norms: int
    attentions: int


def why_no_liger(device: torch.device) -> str | None:
    """Why liger's kernels cannot be used for a model on a device, or None."""
    if device.type != "cuda":
        return f"liger-kernel runs on a GPU; the model is on {device}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed; pip install liger-kernel"
    return None


def use_liger(model: nn.Module) -> LigerUse:
    """Lets a model's RMSNorms and rotary embeddings run in liger-kernel's Triton kernels. In place, reversible.

    Raises:
        RuntimeError: where `why_no_liger` has a reason.
    """
    reason = why_no_liger(next(model.parameters()).device)
    if reason:
        raise RuntimeError(reason)
    from liger_kernel.transformers.functional import liger_rms_norm
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    remove_liger(model)
    norms = attentions = 0
    rotates: dict[Callable, bool] = {}
    for module in model.modules():
        if "forward" in module.__dict__:
            continue
        if type(module).__name__.endswith("RMSNorm"):
            variant = norm_variant(module, liger_rms_norm)
            if variant is not None:
                module.forward = LigerNorm(module, liger_rms_norm, *variant)
                norms += 1
            continue
        rotary = rotary_of(module)
        if rotary is None:
            continue
        if rotary not in rotates:
            rotates[rotary] = rotates_alike(rotary, liger_rotary_pos_emb, module)
        if rotates[rotary]:
            module.forward = with_rotary(module, liger_rotary_pos_emb)
            attentions += 1
    return LigerUse(norms, attentions)


def remove_liger(model: nn.Module) -> None:
    """Undoes `use_liger`."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, LigerNorm) or getattr(forward, "rotary_replaced", False):
            del module.forward


class LigerNorm:
    """The forward of an RMSNorm: liger's kernel. Its backward writes over nothing, as residuals share gradients."""

    def __init__(self, module: nn.Module, norm: Callable, offset: float, casting: str):
        self.module, self.norm, self.offset, self.casting = module, norm, offset, casting
        self.eps = eps_of(module)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x, self.module.weight, self.eps, self.offset, self.casting, False)


def eps_of(module: nn.Module) -> float | None:
    """What a norm adds to the mean square, under the names that transformers gives it."""
    return next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)


def norm_variant(module: nn.Module, norm: Callable) -> tuple[float, str] | None:
    """The variant of liger's norm that gives a module's numbers, or None."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 1 or weight.dtype not in PROBE_BOUNDS or eps_of(module) is None:
        return None
    x = probe(PROBE_ROWS, weight.shape[0], like=weight)
    errors = {}
    with torch.no_grad():
        expected = type(module).forward(module, x).float()
        for offset, casting in NORM_VARIANTS:
            actual = norm(x, weight, eps_of(module), offset, casting, False).float()
            errors[offset, casting] = float((actual - expected).norm() / expected.norm())
    best = min(errors, key=errors.get)
    return best if errors[best] <= PROBE_BOUNDS[weight.dtype] else None


def probe(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """Numbers that leave torch's generators alone."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, device=like.device) * 1.7).to(like.dtype).reshape(shape)


def rotary_of(module: nn.Module) -> Callable | None:
    """The function by which a module's forward rotates q and k, or None."""
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    return forward.__globals__.get(ROTARY)


def rotates_alike(rotary: Callable, replacement: Callable, module: nn.Module) -> bool:
    """Whether two functions rotate `[B, heads, T, head_dim]` alike."""
    head_dim, like = getattr(module, "head_dim", 0), next(module.parameters())
    if not head_dim or head_dim % 2:
        return False
    dtype = torch.bfloat16 if not like.dtype.is_floating_point else like.dtype
    like = like.new_empty(0, dtype=dtype)
    q, k = (probe(2, PROBE_ROWS, heads, head_dim, like=like).transpose(1, 2) for heads in (4, 2))
    angle = torch.outer(torch.arange(PROBE_ROWS, device=like.device), torch.arange(head_dim // 2, device=like.device))
    angle = torch.cat((angle, angle), dim=-1).float().unsqueeze(0)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    try:
        expected = rotary(q.clone(), k.clone(), cos, sin)
        actual = replacement(q.clone(), k.clone(), cos, sin)
    except Exception:  # another signature
        return False
    pairs = list(zip(actual, expected, strict=True))
    if any(a.shape != e.shape for a, e in pairs):
        return False
    return all(float((a.float() - e.float()).norm() / e.float().norm()) <= PROBE_BOUNDS[dtype] for a, e in pairs)


def with_rotary(module: nn.Module, rotary: Callable) -> types.MethodType:
    """A module's forward, as its class has it, in which `apply_rotary_pos_emb` means another function."""
    forward = type(module).forward
    names = {**forward.__globals__, ROTARY: rotary}
    made = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    made.rotary_replaced = True
    return types.MethodType(made, module)
