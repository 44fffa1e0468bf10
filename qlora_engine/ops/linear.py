"""`linear_nf4`: products with a 4-bit weight, and their gradient with respect to the input."""

import torch

from qlora_engine.ops import backend, checks  # noqa: F401  (backend defines the operators)


@torch.library.register_fake("qlora_engine::linear_nf4")
def _(x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, bias):
    checks.linear_nf4(x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, bias)
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("qlora_engine::linear_nf4_backward")
def _(grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features):
    checks.linear_nf4_backward(grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features)
    return grad.new_empty((*grad.shape[:-1], in_features))


def _save_forward(ctx, inputs, output):
    x, *weight, blocksize, _out_features, _bias = inputs
    ctx.save_for_backward(*weight)  # the packed weight itself: no copy, and nothing of x
    ctx.blocksize, ctx.in_features = blocksize, x.shape[-1]


def _linear_backward(ctx, grad):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qlora_engine.linear_nf4_backward(grad, *ctx.saved_tensors, ctx.blocksize, ctx.in_features)
    if ctx.needs_input_grad[7]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
    return grad_x, None, None, None, None, None, None, grad_bias


def _save_backward(ctx, inputs, output):
    grad, *weight, blocksize, _in_features = inputs
    ctx.save_for_backward(*weight)
    ctx.blocksize, ctx.out_features = blocksize, grad.shape[-1]


def _linear_double_backward(ctx, grad_x_grad):
    grad_grad = torch.ops.qlora_engine.linear_nf4(
        grad_x_grad, *ctx.saved_tensors, ctx.blocksize, ctx.out_features, None
    )
    return grad_grad, None, None, None, None, None, None


torch.library.register_autograd("qlora_engine::linear_nf4", _linear_backward, setup_context=_save_forward)
torch.library.register_autograd(
    "qlora_engine::linear_nf4_backward", _linear_double_backward, setup_context=_save_backward
)


def linear_nf4(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    blocksize: int,
    out_features: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Product with a 4-bit weight: `y = x @ W.T + bias`, accumulated in float32.

    Differentiable in `x` and `bias`; the weight is frozen, and backward saves nothing but references to it.

    Args:
        x: float16, bfloat16 or float32 `[..., in_features]`; its dtype is the compute dtype.
        packed, absmax, nested_absmax, nested_offset, blocksize: the weight `[out_features, in_features]`, as
            in `dequantize_nf4`.
        out_features: rows of the weight.
        bias: dtype of `x`, `[out_features]`, or None.

    Returns:
        `[..., out_features]`, dtype of `x`.

    Raises:
        RuntimeError: where a tensor's dtype, size, layout or device does not fit the others.
    """
    return torch.ops.qlora_engine.linear_nf4(
        x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, bias
    )


def linear_nf4_backward(
    grad: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    blocksize: int,
    in_features: int,
) -> torch.Tensor:
    """Gradient of `linear_nf4` with respect to its input: `grad @ W`.

    Args:
        grad: float16, bfloat16 or float32 `[..., out_features]`.
        packed, absmax, nested_absmax, nested_offset, blocksize: the weight `[out_features, in_features]`.
        in_features: columns of the weight.

    Returns:
        `[..., in_features]`, dtype of `grad`.
    """
    return torch.ops.qlora_engine.linear_nf4_backward(
        grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features
    )
