"""Throughput of NF4 dequantization beside a plain copy and rivals.

    python benchmarks/bench_dequant.py              # the GPU if there is one, else the CPU
    python benchmarks/bench_dequant.py --check      # verify bit equality with bitsandbytes first

GB/s count every byte once: packed weights and scales read, decoded weights written. The yardstick is a copy of as
many bytes in all (half of them read, half written).
"""

import sys

import harness
import peers
import torch

import qlora_engine as qe
from qlora_engine.quantization.codebook import dynamic_map, nf4_levels

SHAPES = {
    "cuda": [
        (1024, 4096),
        (4096, 4096),
        (14336, 4096),
        (4096, 14336),
        (28672, 8192),
        (3584, 3584),
        (18944, 3584),
        (2048, 16384),
    ],
    "cpu": [(576, 1536), (4096, 4096)],
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def measure(shape, dtype_name, blocksize, double_quant, timer, device) -> dict:
    """One row of the table."""
    dtype = DTYPES[dtype_name]
    weight = torch.randn(shape, device=device).to(dtype)
    w4 = qe.quantize(weight, blocksize, double_quant)
    nbytes = w4.nbytes + weight.nbytes
    row = {
        "case": f"{shape[0]}x{shape[1]} {dtype_name} b{blocksize} {'double' if double_quant else 'single'}",
        "shape": list(shape),
        "dtype": dtype_name,
        "blocksize": blocksize,
        "double_quant": double_quant,
        "bytes": nbytes,
    }

    def rate(microseconds):
        return nbytes / microseconds / 1e3

    row["ours_us"] = timer(lambda: w4.dequantize())
    row["ours"] = rate(row["ours_us"])
    source = torch.empty(nbytes // 2, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    row["copy"] = rate(timer(lambda: target.copy_(source)))
    if device == "cpu":
        row["clone"] = rate(timer(lambda: source.clone()))
    row["of_copy"] = row["ours"] / row["copy"]
    if peers.bitsandbytes_functional():
        theirs = peers.BitsandbytesWeight(weight, blocksize, double_quant)
        row["bitsandbytes"] = rate(timer(theirs.dequantize))
        row["of_bitsandbytes"] = row["ours"] / row["bitsandbytes"]
    if double_quant and weight.numel() % (256 * blocksize) == 0 and device == "cuda":
        levels = torch.tensor(nf4_levels(), device=device)
        table = torch.tensor(dynamic_map(), device=device)
        decode = peers.compiled_dequantize(levels, blocksize)
        row["torch_compile"] = rate(timer(lambda: decode(*w4.arguments[:4], table, shape, dtype)))
        row["of_torch_compile"] = row["ours"] / row["torch_compile"]
    return row


def check(device: str) -> bool:
    """Bit equality with bitsandbytes on its own packed weight, for every dtype and block size."""
    if not peers.bitsandbytes_functional():
        print("--check: bitsandbytes is not installed, there is nothing to compare with")
        return False
    good = True
    for name, dtype in DTYPES.items():
        for blocksize in (32, 64, 128, 256, 512, 1024):
            for double_quant in (True, False):
                weight = torch.randn(515, 771, device=device).to(dtype)
                theirs = peers.BitsandbytesWeight(weight, blocksize, double_quant)
                state = theirs.state
                scales = (
                    (state.absmax, state.state2.absmax, state.offset) if double_quant else (state.absmax, None, None)
                )
                ours = qe.ops.dequantize_nf4(theirs.packed.view(-1), *scales, blocksize, weight.shape, dtype)
                if not torch.equal(ours, theirs.dequantize()):
                    print(f"--check: differs from bitsandbytes: {name}, blocks of {blocksize}, double={double_quant}")
                    good = False
    print(f"--check: bit equality with bitsandbytes {'holds' if good else 'DOES NOT HOLD'}")
    return good


def main() -> int:
    p = harness.parser(*__doc__.split("\n\n", 1))
    args = p.parse_args()
    device = args.device
    harness.require_compiled(["quantize_nf4", "dequantize_nf4"], device)
    if args.check and not check(device):
        return 1
    timer = harness.Timer(device, args.quick)
    main_dtype = "bf16" if device == "cuda" else "fp32"
    cases = [(shape, main_dtype, 64, True) for shape in SHAPES[device]]
    if device == "cpu":
        cases += [(shape, "bf16", 64, True) for shape in SHAPES[device]]
    if not args.quick:
        base = (4096, 4096)
        cases += [(base, main_dtype, b, d) for b in (64, 128, 1024) for d in (True, False) if (b, d) != (64, True)]
        cases += [(base, d, 64, True) for d in DTYPES if (base, d, 64, True) not in cases]
    rows = [measure(*case, timer, device) for case in cases]
    columns = {"case": "NF4 dequantize", "ours_us": "us", "ours": "GB/s", "copy": "copy", "of_copy": "ours/copy"}
    if device == "cpu":
        columns["clone"] = "copy into new memory"
    columns |= {"bitsandbytes": "bitsandbytes", "of_bitsandbytes": "ours/bnb"}
    if device == "cuda":
        columns |= {"torch_compile": "torch.compile", "of_torch_compile": "ours/compile"}
    print(harness.environment(device))
    print(harness.table(rows, columns))
    name = args.out / f"bench_dequant_{harness.slug(device)}"
    harness.write_json(name.with_suffix(".json"), device, rows)
    series = {"ours": "qlora_engine", "copy": "copy of as many bytes", "bitsandbytes": "bitsandbytes"}
    series |= {"torch_compile": "torch.compile"} if device == "cuda" else {}
    title = f"NF4 dequantization, {harness.environment(device)['device']}"
    harness.bars(name.with_suffix(".png"), rows, "case", series, "GB/s", title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
