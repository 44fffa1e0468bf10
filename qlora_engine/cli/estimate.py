"""`qlora estimate`: the memory that fine-tuning a model takes, from its configuration alone."""

import argparse
import json
import re

from qlora_engine.cli.common import add_command, prepare_libraries, require
from qlora_engine.training.errors import OptionError
from qlora_engine.training.options import FinetuneOptions, add_flags, read_yaml

DESCRIPTION = """\
Computes what `qlora finetune` would take of a GPU from config.json alone: no weights are read or downloaded, and no
GPU is needed. Says whether it fits, and if not, what to turn."""
EXAMPLE = """\
  qlora estimate meta-llama/Llama-3.1-8B --gpu 24GiB --seq 2048 --batch-size 2
  qlora estimate --config run/options.yaml --gpu 16GiB"""
# options of a run that decide its memory
OPTIONS = ("r", "target_modules", "exclude_modules", "blocksize", "double_quant", "dtype", "max_length", "packing")
OPTIONS += ("batch_size", "grad_accum", "optimizer", "optimizer_gpu_gib", "gradient_checkpointing", "activation_gib")
OPTIONS += ("offload_activations", "liger", "cuda_graphs", "objective", "quantize_embeddings", "quantize_head")
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:g|gb|gib)?", re.IGNORECASE)


def add_parser(commands):
    """Describes the command."""
    parser = add_command(
        commands, "estimate", "the memory that fine-tuning takes, before anything is loaded", DESCRIPTION, EXAMPLE
    )
    parser.add_argument("model", nargs="?", help="model folder, config.json or hub id")
    parser.add_argument("--config", metavar="FILE", help="YAML file with the options of a run")
    parser.add_argument("--gpu", metavar="SIZE", help="memory of the GPU, as 24GiB; default: that of the GPU here")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_flags(parser, OPTIONS)
    parser.add_argument("--seq", type=int, dest="max_length", metavar="N", default=argparse.SUPPRESS)
    return parser


def run(args) -> None:
    """Runs the command."""
    require(("yaml", "transformers", "accelerate"))
    options = options_of(args)
    prepare_libraries(options.model, args.debug)
    from qlora_engine.training import estimator

    model = estimator.architecture_for(options)
    report = collect(model, options, gpu_bytes(args.gpu))
    print(json.dumps(report, indent=1) if args.json else as_text(report))


def options_of(args) -> FinetuneOptions:
    """The options of the run that is asked about.

    Raises:
        OptionError: where no model is named, or an option is out of its bounds.
    """
    values = read_yaml(args.config) if args.config else {}
    values |= {name: value for name, value in vars(args).items() if name in OPTIONS}
    if args.model:
        values["model"] = args.model
    return FinetuneOptions(**{"data": "none", **values}).check()


def gpu_bytes(text: str | None) -> int | None:
    """Bytes that "24GiB", "24GB" or "24" mean: cards are sold by the GiB whatever they say. None: the GPU here.

    Raises:
        OptionError: for anything else.
    """
    if text is None:
        import torch

        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    match = SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise OptionError(f"--gpu is {text!r}; expected a size such as 24GiB")
    return int(float(match[1]) * 2**30)


def collect(model, options: FinetuneOptions, gpu: int | None) -> dict:
    """The report: dicts of JSON types."""
    from qlora_engine.training import estimator

    found = estimator.estimate(model, options)
    report = {
        "model": {"name": options.model, "class": model.name, "parameters": model.parameters},
        "layers": len(model.layers),
        "adapter_parameters": sum(model.adapters),
        "batch_size": options.batch_size,
        "sequences": options.sequences,
        "max_length": options.max_length,
        "bytes": dict(found.rows()),
        "total": found.total,
        "host": found.optimizer_host,
        "notes": list(found.notes),
    }
    if gpu is not None:
        fewest = estimator.fewest_recomputed(model, options, gpu)
        report |= {
            "gpu": gpu,
            "fits": found.total <= gpu,
            "largest_batch": estimator.largest_batch(model, options, gpu),
            "fewest_recomputed": fewest,
            "activation_gib": None if fewest is None else estimator.activation_budget(model, options, fewest),
            "changes": [{"flags": c.flags, "total": c.total} for c in estimator.changes(model, options, gpu)],
        }
    return report


def as_text(report: dict) -> str:
    """The report for people."""

    def gib(size: int) -> str:
        return f"{size / 2**30:8.2f} GiB"

    model = report["model"]
    lines = [
        f"{model['name']}: {model['class']}, {model['parameters'] / 1e9:.2f} B parameters in {report['layers']} "
        f"layers, adapters of {report['adapter_parameters'] / 1e6:.1f} M",
        f"{report['sequences']} sequences of {report['max_length']} tokens a forward pass",
        "",
        *(f"{name:<26}{gib(size)}" for name, size in report["bytes"].items()),
        f"{'in all':<26}{gib(report['total'])}",
    ]
    if report["host"]:
        lines.append(f"{'and of host memory':<26}{gib(report['host'])}")
    if "gpu" in report:
        lines += ["", _verdict(report), *_turned(report)]
    return "\n".join([*lines, *(f"note: {note}" for note in report["notes"])])


def _verdict(report: dict) -> str:
    left = (report["gpu"] - report["total"]) / 2**30
    if report["fits"]:
        return f"fits into {report['gpu'] / 2**30:.1f} GiB with {left:.1f} to spare"
    return f"does not fit into {report['gpu'] / 2**30:.1f} GiB: {-left:.1f} too much"


def _turned(report: dict) -> list[str]:
    lines = [f"  {c['total'] / 2**30:8.2f} GiB with {c['flags']}" for c in report["changes"]]
    if report["fits"]:
        lines.append(f"  up to --batch-size {report['largest_batch']} at this length")
        again, layers = report["fewest_recomputed"], report["layers"]
        if again == 0:
            lines.append("  faster, and fits as well: --gradient-checkpointing none")
        elif again is not None and again < layers - 1:
            budget = report["activation_gib"]
            lines.append(
                f"  faster, and fits as well: --activation-gib {budget} ({again} of {layers} layers recomputed)"
            )
    elif report["changes"] and report["changes"][-1]["total"] > report["gpu"]:
        lines.append("  none of these is enough: choose a smaller model or a larger GPU")
    return lines
