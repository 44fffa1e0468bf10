"""Every CUDA operator once at odd shapes, for compute-sanitizer, under which the test suite would take hours.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python tests/sanitize.py products

Without the cache of torch's allocator every tensor is an allocation of its own: accesses beyond one are found.
Names: quantize, products, backward, optimizer; none: all.
"""

import os
import sys

import torch

from qlora_engine import ops, quantize
from qlora_engine.optim import PagedAdamW

WAYS = ["few", "dequantize", "fused:sm80"]
WAYS += [f"levels:{tokens},1,{splits}" for tokens in (8, 16, 32, 64, 128) for splits in (1, 3)]
WAYS += [f"fused:{tokens},1,{splits}" for tokens in (16, 32, 64, 128, 256) for splits in (1, 2)] + ["fused:256,2,1"]


def weight(N: int, K: int, blocksize: int = 64, double_quant: bool = True, scales: str = "absmax"):
    return quantize(torch.randn(N, K, device="cuda"), blocksize, double_quant, scales)


def quantizing() -> None:
    for shape in ((77, 128), (131, 1088)):
        for blocksize in (64, 128, 4096):
            for double_quant in (True, False):
                w4 = weight(*shape, blocksize, double_quant)
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    w4.dequantize(dtype)
    for double_quant in (True, False):
        weight(77, 128, 64, double_quant, "search")


def products() -> None:
    for way in WAYS:
        os.environ["QLORA_ENGINE_LINEAR"] = way
        for N, K, double_quant in ((131, 832, True), (264, 512, False)):
            w4 = weight(N, K, 64, double_quant)
            for M in (5, 16) if way == "few" else (5, 150):
                x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
                bias = torch.randn(N, device="cuda", dtype=torch.bfloat16)
                ops.linear_nf4(x, *w4.arguments, N, bias)
                S, B = (torch.randn(rows, 24, device="cuda", dtype=torch.bfloat16) for rows in (M, N))
                ops.linear_nf4_lora(x, *w4.arguments, N, S, B, bias)
    del os.environ["QLORA_ENGINE_LINEAR"]


def backward() -> None:
    for way in ("auto", "few", "levels:16,1,2", "levels:64,1,1", "levels:256,1,3", "many", "dequantize"):
        os.environ["QLORA_ENGINE_BACKWARD"] = way
        for N, K, double_quant in ((136, 832, True), (264, 512, False)):
            w4 = weight(N, K, 64, double_quant)
            for M in (5, 40) if way == "few" else (5, 40, 150, 600):
                grad = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)
                dx = ops.linear_nf4_backward(grad, *w4.arguments, K)
                ops.linear_nf4_backward_add(dx, grad, *w4.arguments)
                dS, A = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((M, 24), (24, K)))
                ops.linear_nf4_backward_lora(grad, *w4.arguments, K, dS, A, dx)
    del os.environ["QLORA_ENGINE_BACKWARD"]


def optimizer() -> None:
    for bits in (32, 8):
        params = [torch.randn(n, device="cuda", requires_grad=True) for n in (1, 77, 5000)]
        adamw = PagedAdamW(params, lr=1e-3, bits=bits)
        for _ in range(2):
            for param in params:
                param.grad = torch.randn_like(param)
            adamw.step()
        adamw.close()


ALL = {"quantize": quantizing, "products": products, "backward": backward, "optimizer": optimizer}

if __name__ == "__main__":
    for name in sys.argv[1:] or ALL:
        ALL[name]()
        torch.cuda.synchronize()
        print(f"{name}: done", flush=True)
