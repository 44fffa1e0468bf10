"""Throughput of NF4 quantization beside rivals.

    python benchmarks/bench_quantize.py --check

GB/s count every byte once: weights read, packed weights and scales written. "absmax" is what bitsandbytes does;
"search" and "signed" choose scales that lower the squared error, by the part in the column "error".
"""

import sys

import harness
import peers
import torch

import qlora_engine as qe

SHAPES = {"cuda": [(4096, 4096), (14336, 4096), (28672, 8192)], "cpu": [(576, 1536), (4096, 4096)]}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# how scales are found, and whether they are quantized to 8 bits
KINDS = [("absmax", False), ("absmax", True), ("search", True), ("signed", False)]


def squared_error(weight, w4) -> float:
    return (w4.dequantize(torch.float32) - weight.float()).square().mean().item()


def measure(shape, dtype_name, scales, double_quant, timer, device) -> dict:
    """One row of the table."""
    weight = torch.randn(shape, device=device).to(DTYPES[dtype_name])
    w4 = qe.quantize(weight, 64, double_quant, scales)
    nbytes = weight.nbytes + w4.nbytes
    row = {"case": f"{shape[0]}x{shape[1]} {dtype_name} {scales} {'double' if double_quant else 'single'}"}
    row |= {"shape": list(shape), "dtype": dtype_name, "scales": scales, "double_quant": double_quant}
    row["bytes"] = nbytes
    if scales != "absmax":
        row["error"] = squared_error(weight, w4) / squared_error(weight, qe.quantize(weight, 64, double_quant)) - 1
    row["ours_us"] = timer(lambda: qe.quantize(weight, 64, double_quant, scales))
    row["ours"] = nbytes / row["ours_us"] / 1e3
    if device == "cuda":  # without the host's part, which bounds small weights
        row["graph"] = nbytes / timer.graph(lambda: qe.quantize(weight, 64, double_quant, scales)) / 1e3
    source = torch.empty(nbytes // 2, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    row["copy"] = nbytes / timer(lambda: target.copy_(source)) / 1e3
    row["of_copy"] = row["ours"] / row["copy"]
    if peers.bitsandbytes_functional():
        microseconds = timer(lambda: peers.BitsandbytesWeight(weight, 64, double_quant))
        row["bitsandbytes_us"] = microseconds
        row["bitsandbytes"] = nbytes / microseconds / 1e3
        row["of_bitsandbytes"] = row["ours"] / row["bitsandbytes"]
    return row


def check(device: str) -> bool:
    """Bit equality with bitsandbytes: packed weights, scales, and the scales of the scales."""
    if not peers.bitsandbytes_functional():
        print("--check: bitsandbytes is not installed, there is nothing to compare with")
        return False
    good = True
    for name, dtype in DTYPES.items():
        for double_quant in (True, False):
            weight = torch.randn(515, 771, device=device).to(dtype)
            theirs, ours = peers.BitsandbytesWeight(weight, 64, double_quant), qe.quantize(weight, 64, double_quant)
            pairs = [(ours.packed, theirs.packed.view(-1))]
            if double_quant:
                # the mean of the scales is theirs to a few digits on a GPU; given theirs, all else is equal
                offset = theirs.state.offset
                _, absmax = qe.ops.quantize_nf4(weight, 64)
                codes, nested_absmax = torch.ops.qlora_engine.quantize_absmax(absmax, offset, 256)
                pairs += [(codes, theirs.state.absmax), (nested_absmax, theirs.state.state2.absmax)]
                codes, nested_absmax = torch.ops.qlora_engine.quantize_absmax(absmax, ours.nested_offset, 256)
                pairs += [(ours.absmax, codes), (ours.nested_absmax, nested_absmax)]
                good &= bool((ours.nested_offset / offset - 1).abs() < 1e-6)
            else:
                pairs.append((ours.absmax, theirs.state.absmax))
            if not all(torch.equal(a, b) for a, b in pairs):
                print(f"--check: differs from bitsandbytes: {name}, double={double_quant}")
                good = False
    print(f"--check: bit equality with bitsandbytes {'holds' if good else 'DOES NOT HOLD'}")
    return good


def main() -> int:
    args = harness.parser(*__doc__.split("\n\n", 1)).parse_args()
    device = args.device
    harness.require_compiled(["quantize_nf4", "quantize_nf4_double", "quantize_nf4_search"], device)
    if args.check and not check(device):
        return 1
    timer = harness.Timer(device, args.quick)
    dtypes = ["bf16"] if device == "cuda" else ["fp32", "bf16"]
    cases = [(s, d, *kind) for s in SHAPES[device] for d in dtypes for kind in KINDS]
    rows = [measure(*case, timer, device) for case in cases]
    columns = {"case": "NF4 quantize", "ours_us": "us", "ours": "GB/s", "copy": "copy", "of_copy": "ours/copy"}
    columns |= {"bitsandbytes_us": "bnb us", "bitsandbytes": "bnb GB/s", "of_bitsandbytes": "ours/bnb"}
    columns |= {"graph": "GB/s in a graph", "error": "error"}
    print(harness.environment(device))
    print(harness.table(rows, columns))
    name = args.out / f"bench_quantize_{harness.slug(device)}"
    harness.write_json(name.with_suffix(".json"), device, rows)
    series = {"ours": "qlora_engine", "copy": "copy of as many bytes", "bitsandbytes": "bitsandbytes"}
    title = f"NF4 quantization, {harness.environment(device)['device']}"
    harness.bars(name.with_suffix(".png"), rows, "case", series, "GB/s", title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
