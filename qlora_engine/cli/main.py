"""The command `qlora`."""

import argparse
import importlib
import os
import sys

from qlora_engine.cli.common import Formatter
from qlora_engine.training.errors import Interrupted, UsageError

COMMANDS = ("finetune", "search", "quantize", "merge", "generate", "convert", "estimate", "env", "bench")
USAGE_EXIT, INTERRUPT_EXIT = 2, 130
DESCRIPTION = """\
Fine-tune a large language model on a frozen 4-bit base.

  qlora finetune --model MODEL --data rows.jsonl --output run    train an adapter, write a report
  qlora search --model MODEL --data rows.jsonl --output found    find rank, scaling and learning rate
  qlora generate --model MODEL --adapter run/adapter --prompt "..."
  qlora merge --model MODEL --adapter run/adapter --output merged
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each is described in its own module."""
    parser = argparse.ArgumentParser(prog="qlora", description=DESCRIPTION, formatter_class=Formatter)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"qlora_engine.cli.{name}")
        command = module.add_parser(commands)
        command.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
        command.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 for the user's mistakes, 130 after an interruption."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()  # here, where a closed pipe is understood, and not at exit
        return 0
    except UsageError as error:
        if args.debug:
            raise
        print(f"qlora: error: {error}", file=sys.stderr)
        return USAGE_EXIT
    except Interrupted as stop:
        print(f"qlora: {stop}", file=sys.stderr)
        return INTERRUPT_EXIT
    except KeyboardInterrupt:
        print("qlora: stopped", file=sys.stderr)
        return INTERRUPT_EXIT
    except BrokenPipeError:  # the reader of the output has gone, as in `qlora generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
