"""Every operator's schema, in one place.

The schemas are defined from Python so that the operators exist, with the pure-PyTorch reference behind them,
where no library was compiled; `csrc/cpu` and `csrc/cuda` only add implementations to them.

A 4-bit weight reaches an operator as plain tensors:

packed         uint8   [ceil(n / 2)]            two codes a byte, the first element in the high nibble
absmax         float32 [ceil(n / blocksize)]    one scale a block; uint8 codes of it where double-quantized
nested_absmax  float32 [ceil(len(absmax)/256)]  scales of the scales; None where single-quantized
nested_offset  float32 []                       mean that was removed from the scales; None likewise
"""

NAMESPACE = "qlora_engine"

_WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, int blocksize"

SCHEMAS = {
    # weight: float16, bfloat16 or float32, contiguous, any shape -> packed, absmax (float32)
    "quantize_nf4": "(Tensor weight, int blocksize) -> (Tensor, Tensor)",
    # The same, and quantize_absmax of the scales with their mean -> packed, codes (uint8), nested_absmax, offset
    "quantize_nf4_double": "(Tensor weight, int blocksize) -> (Tensor, Tensor, Tensor, Tensor)",
    # Scales that make the squared error small, of either sign with `signed` -> packed, absmax (float32)
    "quantize_nf4_search": "(Tensor weight, int blocksize, bool signed) -> (Tensor, Tensor)",
    # -> Tensor of `shape` and `dtype`
    "dequantize_nf4": f"({_WEIGHT}, int[] shape, ScalarType dtype) -> Tensor",
    # absmax float32 [b], offset float32 [] -> codes of absmax - offset (uint8 [b]), nested_absmax (float32)
    "quantize_absmax": "(Tensor absmax, Tensor offset, int blocksize) -> (Tensor, Tensor)",
    # -> float32 [b]
    "dequantize_absmax": ("(Tensor quantized, Tensor nested_absmax, Tensor nested_offset, int blocksize) -> Tensor"),
    # x [..., K] @ W[N, K].T + bias [N] -> [..., N], dtype of x
    "linear_nf4": f"(Tensor x, {_WEIGHT}, int out_features, Tensor? bias) -> Tensor",
    # linear_nf4 + S [M, r] @ B [N, r].T, of the dtype of x: with S = x A^T a layer with a low-rank adapter
    "linear_nf4_lora": f"(Tensor x, {_WEIGHT}, int out_features, Tensor S, Tensor B, Tensor? bias) -> Tensor",
    # grad [..., N] @ W[N, K] -> [..., K], dtype of grad: the gradient of linear_nf4 with respect to x
    "linear_nf4_backward": f"(Tensor grad, {_WEIGHT}, int in_features) -> Tensor",
    # linear_nf4_backward + dS [M, r] @ A [r, K] + addend [..., K]
    "linear_nf4_backward_lora": (
        f"(Tensor grad, {_WEIGHT}, int in_features, Tensor dS, Tensor A, Tensor? addend) -> Tensor"
    ),
    # dx [..., K] += grad [..., N] @ W[N, K]
    "linear_nf4_backward_add": f"(Tensor(a!) dx, Tensor grad, {_WEIGHT}) -> ()",
}

# The narrow products of a low-rank adapter. Matrices only; see ops/lora.py. `seed` int64 [1], None without dropout.
ADAPTER_SCHEMAS = {
    # scaling * drop(x) [M, K] @ stacked lora_A [R, K].T -> [M, R], dtype of x
    "lora_down": "(Tensor x, Tensor[] lora_A, float scaling, float dropout_p, Tensor? seed) -> Tensor",
    # y [M, N] += addends + keep * scaling * S [M, R] @ lora_B [N, R].T
    "lora_add": (
        "(Tensor(a!) y, Tensor S, Tensor lora_B, float scaling, Tensor[] addends, float dropout_p, Tensor? seed)"
        " -> ()"
    ),
    # grad_S [M, R] = scaling * grad [M, N] @ lora_B; scaling * grad.T @ S -> [N, R], dtype of lora_B
    "lora_grad_B": "(Tensor grad, Tensor S, Tensor lora_B, float scaling, Tensor(a!) grad_S) -> Tensor",
    # grad_S [M, R].T @ drop(x) [M, K] -> [R, K]
    "lora_grad_A": "(Tensor grad_S, Tensor x, float dropout_p, Tensor? seed, ScalarType dtype) -> Tensor",
    # act(gate) * up; see ops/gated.py
    "gated_activation": "(Tensor gate, Tensor up, str activation) -> Tensor",
    # -> act(gate) * up and the gradients of gate and up
    "gated_activation_backward": "(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor, Tensor)",
    # the same, over grad, gate and up
    "gated_activation_backward_inplace": ("(Tensor(a!) grad, Tensor(b!) gate, Tensor(c!) up, str activation) -> ()"),
}

_WEIGHTS = "Tensor[] packed, Tensor[] absmax, Tensor?[] nested_absmax, Tensor?[] nested_offset, int[] blocksizes"

# Layers with adapters, one to three of one input; every list has one entry a projection. See ops/adapter.py.
LAYER_SCHEMAS = {
    # x [M, K] -> outputs [M, N], S [M, sum of ranks]
    "adapter_forward": (
        f"(Tensor x, {_WEIGHTS}, int[] out_features, Tensor?[] biases, Tensor[] lora_A, Tensor[] lora_B, "
        "float[] scalings) -> (Tensor[], Tensor)"
    ),
    # -> gradient of S [M, sum of ranks], gradients of lora_B
    "adapter_backward_S": "(Tensor[] grads, Tensor S, Tensor[] lora_B, float[] scalings) -> (Tensor, Tensor[])",
    # -> gradient of x [M, K]
    "adapter_backward_x": f"(Tensor[] grads, Tensor grad_S, {_WEIGHTS}, Tensor[] lora_A) -> Tensor",
}

# Operators that change their arguments and return nothing that has a gradient. See ops/adamw.py.
OPTIMIZER_SCHEMAS = {
    "adamw_step": (
        "(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!) steps, Tensor(c!)[] memory, Tensor pages, int cold_pages, "
        "Tensor(d!)[] table, Tensor? multiplier, Tensor? skip, float[] hyper, int[] groups, int[] layouts, int seed)"
        " -> ()"
    ),
    # The L2 norm of all gradients together, float32 []; NaN or infinity where one of them holds such a number
    "gradient_norm": "(Tensor?[] grads, Tensor pages, Tensor(a!)[] table) -> Tensor",
    # Whether the host and `like`'s device may use managed memory at the same time (concurrentManagedAccess)
    "concurrent_managed_access": "(Tensor like) -> bool",
    # uint8 [bytes] of zeroed host memory that kernels of `like`'s device read and write in place: managed memory that
    # prefers the host, else pinned memory. It presents itself as a tensor of that device.
    "host_slab": "(Tensor like, int bytes, bool managed) -> Tensor",
    # Between any two of device memory, host slabs and ordinary memory; both uint8 of one size
    "copy_bytes": "(Tensor source, Tensor(a!) target) -> ()",
}
