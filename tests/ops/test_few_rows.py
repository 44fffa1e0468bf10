"""`linear_nf4` with few rows on CUDA: every way of sharing W out among multiprocessors, warps and stages."""

import pytest
import torch

from qlora_engine import ops, quantize
from qlora_engine.ops.linear import LINEAR_ENVIRONMENT_VARIABLE, linear_path
from tests.numerics import RELATIVE_RMS, assert_close, relative_rms

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    """The kernel for few rows, where another may have been measured to be faster."""
    if torch.cuda.get_device_capability() == (9, 0):
        monkeypatch.setenv(LINEAR_ENVIRONMENT_VARIABLE, "few")


# On 132 multiprocessors: 1, 2, 3, 4, 5 and 8 groups of 8 rows each, two panels, and an odd last one.
ROWS = [1, 7, 8, 1056, 1057, 2113, 4096, 5000, 8449, 9001]
COLUMNS = [64, 192, 1024, 1088, 2304]


def product(M, N, K, dtype, double_quant=True, blocksize=64, bias=None):
    w4 = quantize(torch.randn(N, K, device="cuda"), blocksize, double_quant)
    x = torch.randn(M, K, device="cuda", dtype=dtype)
    weight = w4.dequantize(dtype).double()
    expected = x.double() @ weight.T
    # what a sum of so many terms is usually worth: a single small one says nothing about its error
    size = (x.double().square() @ weight.square().T).sqrt()
    return (lambda: ops.linear_nf4(x, *w4.arguments, N, bias)), expected, size


@pytest.mark.parametrize("M", [1, 3, 8, 11, 16])
@pytest.mark.parametrize("K", COLUMNS)
@pytest.mark.parametrize("N", ROWS)
def test_every_share(N, K, M, poisoned_memory):
    dtype, double_quant = (torch.bfloat16, torch.float16)[N % 2], M != 3
    run, expected, size = product(M, N, K, dtype, double_quant)
    y = run()
    assert_close("y", y, expected, 1.5 * RELATIVE_RMS[dtype], size)
    # a block of 64 columns left out of one sum moves it by a sixth of its size at least
    assert ((y.double() - expected).abs() / size).max() <= 0.03
    assert torch.equal(run(), y)


@pytest.mark.parametrize("blocksize", [64, 128, 512, 4096])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("M", [4, 16])
def test_every_block_size(M, double_quant, blocksize):
    bias = torch.randn(2000, device="cuda", dtype=torch.bfloat16)
    run, expected, _ = product(M, 2000, 8192, torch.bfloat16, double_quant, blocksize, bias)
    assert_close("y", run(), expected + bias.double(), RELATIVE_RMS[torch.bfloat16])


def test_scales_at_odd_addresses():
    """Scales that are views into a longer tensor are read one by one."""
    w4 = quantize(torch.randn(300, 1024, device="cuda"), 64, double_quant=False)
    x = torch.randn(5, 1024, device="cuda", dtype=torch.bfloat16)
    packed, absmax, *rest = w4.arguments
    moved = torch.cat([absmax.new_zeros(1), absmax])[1:]
    expected = ops.linear_nf4(x, packed, absmax, *rest, 300, None)
    assert torch.equal(ops.linear_nf4(x, packed, moved, *rest, 300, None), expected)


def test_no_less_accurate_than_a_decoded_weight():
    """Against the exact weight: rounding levels must cost no more than rounding decoded elements does."""
    w4 = quantize(torch.randn(512, 4096, device="cuda"), 64)
    exact = w4.dequantize(torch.float32).double()
    x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16)
    expected = x.double() @ exact.T
    ours = relative_rms(ops.linear_nf4(x, *w4.arguments, 512, None), expected)
    decoded = relative_rms(x @ w4.dequantize(torch.bfloat16).T, expected)
    assert ours < 1.3 * decoded


@pytest.mark.parametrize("M", [1, 16])
def test_holds_no_decoded_weight(M):
    w4 = quantize(torch.randn(4096, 4096, device="cuda"), 64)
    x = torch.randn(M, 4096, device="cuda", dtype=torch.bfloat16)
    ops.linear_nf4(x, *w4.arguments, 4096, None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.linear_nf4(x, *w4.arguments, 4096, None)
    assert torch.cuda.max_memory_allocated() - before < 1 << 20  # a decoded weight would be 32 MiB


def test_is_refused_by_name_for_more_rows():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("another limit, and nothing forced")
    assert linear_path(16, 2000, 4096, torch.bfloat16).name == "few rows"
    with pytest.raises(
        RuntimeError, match="QLORA_ENGINE_LINEAR=few, but the kernel for few rows takes up to 16 rows"
    ):
        linear_path(17, 2000, 4096, torch.bfloat16)
