"""`qlora finetune`: train an adapter on a 4-bit model and write a report."""

from pathlib import Path

from qlora_engine.cli.common import TRAIN_PACKAGES, add_command, mib, prepare_libraries, require
from qlora_engine.training.options import FinetuneOptions, add_flags, build_options

DESCRIPTION = """\
Quantizes a model to NF4, trains LoRA adapters on it, and writes adapter and report into one folder.

The data is .jsonl, .csv, .parquet or a saved `datasets` folder whose rows have `prompt` and `completion`, or
`messages`, or `text`; with --objective dpo `prompt`, `chosen` and `rejected`. Every option is also a key of the YAML
file given with --config (with _ for -); flags win. Ctrl-C saves a checkpoint; --resume goes on with the same numbers.
Under torchrun or accelerate launch it trains in several processes, each with its GPU; --sharding says whether they
share one model."""
EXAMPLE = """\
  qlora finetune --model HuggingFaceTB/SmolLM2-135M-Instruct --data rows.jsonl --output run --r 16 --epochs 3
  qlora finetune --config run/options.yaml --resume
  qlora finetune --model MODEL --data preferences.jsonl --objective dpo --beta 0.1 --learning-rate 5e-6
  torchrun --nproc-per-node 8 --no-python -- qlora finetune --model MODEL --data rows.jsonl --sharding full"""


def add_parser(commands):
    """Describes the command."""
    parser = add_command(commands, "finetune", "train an adapter and write a report", DESCRIPTION, EXAMPLE)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the options")
    add_flags(parser)
    return parser


def run(args) -> None:
    """Runs the command."""
    given = {name: value for name, value in vars(args).items() if name in FinetuneOptions.__dataclass_fields__}
    require(("yaml",))
    options = build_options(given, args.config)
    require(TRAIN_PACKAGES)
    prepare_libraries(options.model, args.debug)
    from qlora_engine.training import parallel
    from qlora_engine.training.finetune import finetune

    text = closing_text(finetune(options))
    if parallel.is_first():
        print(text)
    parallel.leave()


def closing_text(result) -> str:
    """What a run ends with on standard output."""
    summary, sizes = result.summary, result.summary["bytes"]
    lines = []
    if summary["eval_loss"]:
        lines.append(f"held-out loss    {summary['eval_loss']['before']:.4f} -> {summary['eval_loss']['after']:.4f}")
    if summary.get("eval_rewards"):
        before, after = (summary["eval_rewards"][when] for when in ("before", "after"))
        lines.append(f"reward accuracy  {before['accuracies']:.1%} -> {after['accuracies']:.1%} of held-out pairs")
        lines.append(f"reward margin    {before['margins']:.4f} -> {after['margins']:.4f}")
    if summary["train_loss"]:
        lines.append(f"training loss    {summary['train_loss']['first']:.4f} -> {summary['train_loss']['last']:.4f}")
    peaks = ", ".join(f"{name} {mib(value)}" for name, value in summary["peak_memory_bytes"].items())
    lines += [
        f"speed            {summary['tokens_per_second']:,} tokens/s, {summary['seconds']['total']:.0f} s in all",
        f"peak memory      {peaks}",
        f"model in 16 bits {mib(sizes['model_16bit'])}",
        f"model in 4 bits  {mib(sizes['model_4bit'])}",
        f"adapter          {mib(sizes['adapter'])}  {result.adapter}",
        f"report           {result.output / 'README.md'}",
        f"samples          {result.output / 'samples.md'}",
        f"loss curve       {Path(result.output, 'loss_curve.png')}",
    ]
    return "\n".join(lines)
