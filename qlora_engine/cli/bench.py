"""`qlora bench`: a card report of about a minute, beside the committed figures of the same card."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from qlora_engine.cli.common import add_command
from qlora_engine.training.errors import UsageError

DESCRIPTION = """\
Times quantization, dequantization and products with a 4-bit weight on this machine, beside a copy of as many bytes
or a product with a 16- or 32-bit weight, and beside the figures of benchmarks/results for the same card. Absolute
times of a card drift; the ratio to the yardstick holds. Close other programs that use the device."""
EXAMPLE = "  qlora bench --device cuda"
SLOWER = 1.25  # times the committed ratio from which a row is called slower
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
SHAPE = (4096, 4096)
ROWS = {"cuda": (1, 16, 128, 2048), "cpu": (1, 16, 128)}


def add_parser(commands):
    """Describes the command."""
    parser = add_command(
        commands, "bench", "a minute's report of this machine beside committed figures", DESCRIPTION, EXAMPLE
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the committed figures"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args) -> None:
    """Runs the command."""
    import torch

    from qlora_engine.ops import backend
    from qlora_engine.training.device import choose_device

    device = choose_device(args.device)
    if backend.implementation("linear_nf4", device.type) != "compiled":
        why = backend.library_error() or backend.build_info().get("reason")
        raise UsageError(
            f"the operators for {device} are not compiled ({why}); there is nothing to time; see `qlora env`"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    figures = Figures.read(args.results, device_name(device), device.type)
    report = {
        "device": device_name(device),
        "committed": figures.source,
        "rows": [compared(row, figures) for row in measure(device.type)],
    }
    print(json.dumps(report, indent=1) if args.json else as_text(report))


def device_name(device) -> str:
    """The name of a GPU, or of the processor."""
    import torch

    from qlora_engine.cli.env import _cpu_field

    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_field("model name")


@dataclass(frozen=True)
class Figures:
    """Committed rows of one card.

    Attributes:
        source: where they are from, or why there are none.
        rows: operator ("dequantize", "quantize", "linear") -> rows as the benchmarks wrote them.
    """

    source: str
    rows: dict[str, list[dict]]

    @classmethod
    def read(cls, folder: Path, name: str, kind: str) -> "Figures":
        """The figures of the card `name`; of any processor for a CPU, which the source says."""
        found, sources = {}, []
        for file in sorted(folder.glob("bench_*.json")):
            operator = re.match(r"bench_(dequantize|dequant|quantize|linear)_(?!.*(fused|dequantize))", file.name)
            content = json.loads(file.read_text()) if operator else {}
            environment = content.get("environment", {})
            if not operator or ("cuda" in environment) != (kind == "cuda"):
                continue
            if kind == "cuda" and environment.get("device") != name:
                continue
            rows = found.setdefault(operator[1].replace("dequantize", "dequant"), [])
            rows += content["rows"]
            sources.append(f"{environment['device']}, {environment['date']}, {environment['commit']}")
        if not found:
            what = "this card" if kind == "cuda" else "a CPU"
            return cls(f"none of {what} in {folder}", {})
        return cls("; ".join(dict.fromkeys(sources)), found)

    def ratio(self, operator: str, key: str, **wanted) -> float | None:
        """A committed row's figure `key` by its properties; None where there is no such row."""
        for row in self.rows.get(operator, []):
            if all(row.get(name, default) == value for name, (value, default) in wanted.items()):
                return row.get(key)
        return None


def measure(device: str) -> list[dict]:
    """Rows of what was measured: case, microseconds, the yardstick's, and how to find the committed figure."""
    import torch
    import torch.nn.functional as F

    import qlora_engine as qe
    from qlora_engine import ops
    from qlora_engine.timing import Timer

    timer = Timer(device, quick=True)
    name, dtype = ("bf16", torch.bfloat16) if device == "cuda" else ("fp32", torch.float32)
    N, K = SHAPE
    weight = (torch.randn(SHAPE, device=device) / K**0.5).to(dtype)
    w4 = qe.quantize(weight)
    source = torch.empty((w4.nbytes + weight.nbytes) // 2, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = timer(lambda: target.copy_(source))
    common = {"shape": (list(SHAPE), None), "dtype": (name, None), "double_quant": (True, None)}
    rows = [
        _row(
            "dequantize", "dequant", timer(lambda: w4.dequantize()), copy, "of_copy", common | {"blocksize": (64, 64)}
        ),
        _row(
            "quantize",
            "quantize",
            timer(lambda: qe.quantize(weight)),
            copy,
            "of_copy",
            common | {"scales": ("absmax", "absmax")},
        ),
    ]
    for M in ROWS[device]:
        x = torch.randn(M, K, device=device, dtype=dtype)
        grad = torch.randn(M, N, device=device, dtype=dtype)
        wanted = {"N": (N, None), "K": (K, None), "M": (M, None), "dtype": (name, None)}
        ours, dense = timer(lambda x=x: ops.linear_nf4(x, *w4.arguments, N)), timer(lambda x=x: F.linear(x, weight))
        rows.append(_row(f"product, {M} rows", "linear", ours, dense, "ours_over_dense", wanted))
        ours = timer(lambda grad=grad: ops.linear_nf4_backward(grad, *w4.arguments, K))
        dense = timer(lambda grad=grad: grad @ weight)
        rows.append(_row(f"gradient, {M} rows", "linear", ours, dense, "backward_over_dense", wanted))
    return rows


def _row(case: str, operator: str, ours: float, yardstick: float, key: str, wanted: dict) -> dict:
    return {"case": case, "us": ours, "yardstick_us": yardstick, "find": (operator, key, wanted)}


def compared(row: dict, figures: Figures) -> dict:
    """A row with its ratio, the committed ratio, and how many times as slow as that it is; None without one."""
    operator, key, wanted = row.pop("find")
    ratio = row["us"] / row["yardstick_us"]
    committed = figures.ratio(operator, key, **wanted)
    if committed is not None and key == "of_copy":  # as fast as a copy: the inverse of the times' ratio
        committed = 1 / committed
    return row | {
        "ratio": ratio,
        "committed": committed,
        "slower": None if committed is None else ratio / committed,
    }


def as_text(report: dict) -> str:
    """The report for people."""
    lines = [
        f"{report['device']}, weight {SHAPE[0]}x{SHAPE[1]}; the yardstick is a copy, or a dense weight",
        f"committed figures: {report['committed']}",
        "",
        f"{'':<20}{'us':>10}{'yardstick':>12}{'ratio':>8}{'committed':>11}",
    ]
    for row in report["rows"]:
        committed = "-" if row["committed"] is None else f"{row['committed']:.2f}"
        verdict = (
            f"  {row['slower']:.1f} times as slow as committed" if row["slower"] and row["slower"] > SLOWER else ""
        )
        figures = f"{row['us']:>10,.1f}{row['yardstick_us']:>12,.1f}{row['ratio']:>8.2f}{committed:>11}"
        lines.append(f"{row['case']:<20}{figures}{verdict}")
    return "\n".join(lines)
