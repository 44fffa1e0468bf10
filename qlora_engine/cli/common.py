"""What the commands share: flags, quiet libraries, and the loading of a model for use."""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

from qlora_engine.training.errors import MissingDependency

TRAIN_PACKAGES = ("transformers", "trl", "datasets", "accelerate", "yaml", "matplotlib", "psutil")
LOAD_PACKAGES = ("transformers", "psutil")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of examples, and shows defaults unless a help text already does."""

    def _get_help_string(self, action):
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS, []) or "(default:" in text or action.required:
            return text
        return super()._get_help_string(action)


def add_command(commands, name: str, help: str, description: str, example: str) -> argparse.ArgumentParser:
    """Adds a subcommand whose help ends with an example."""
    return commands.add_parser(
        name, help=help, description=description, epilog=f"example:\n{example}", formatter_class=Formatter
    )


def add_model_flags(parser: argparse.ArgumentParser, adapter: bool) -> None:
    """--model, --adapter (where `adapter`), --device and --dtype."""
    parser.add_argument("--model", required=True, help="model: a folder, a hub id, or a GGUF file")
    if adapter:
        parser.add_argument("--adapter", help="folder with an adapter in PEFT's format")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="auto: bf16 on a GPU, fp32 on a CPU"
    )


def add_quantization_flags(parser: argparse.ArgumentParser) -> None:
    """--blocksize, --double-quant, --scales and what else is quantized, for models that are not quantized yet."""
    parser.add_argument("--blocksize", type=int, default=64, metavar="N", help="elements that share one scale")
    parser.add_argument(
        "--double-quant", action=argparse.BooleanOptionalAction, default=True, help="quantize the scales as well"
    )
    parser.add_argument(
        "--scales",
        default="absmax",
        choices=("absmax", "search", "signed"),
        help="how scales are found: search leaves a lower error; signed a lower one still, with --no-double-quant",
    )
    parser.add_argument("--quantize-embeddings", action="store_true", help="store the input embeddings in 4 bits too")
    parser.add_argument("--quantize-head", action="store_true", help="store the output head in 4 bits too")


def require(packages: tuple[str, ...], extra: str = "train") -> None:
    """Raises MissingDependency naming the packages that are not installed, and the extra that has them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"this command needs {', '.join(missing)}; install with: pip install 'qlora_engine[{extra}]'"
        )


def prepare_libraries(model: str, debug: bool) -> None:
    """To be called before transformers is imported: no hub for local models, and no chatter unless --debug."""
    from qlora_engine.training.source import is_on_this_machine, work_offline

    if is_on_this_machine(model):
        work_offline()
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def load_for_use(args: argparse.Namespace):
    """(model, tokenizer) for generation, merging or saving: quantized, with --adapter if there is one.

    Raises:
        UsageError: for what the user can put right.
    """
    require(LOAD_PACKAGES)
    prepare_libraries(args.model, args.debug)
    from transformers import AutoTokenizer

    from qlora_engine.models.checkpoint import load_quantized
    from qlora_engine.models.config import QLoRAConfig
    from qlora_engine.training import memory
    from qlora_engine.training.device import choose_device, choose_dtype
    from qlora_engine.training.errors import as_usage_error, out_of_memory_as_usage_error
    from qlora_engine.training.source import resolve_model

    quantization = {
        "blocksize": getattr(args, "blocksize", 64),
        "double_quant": getattr(args, "double_quant", True),
        "quantize_embeddings": getattr(args, "quantize_embeddings", False),
        "quantize_head": getattr(args, "quantize_head", False),
    }
    with as_usage_error():
        config = QLoRAConfig(r=0, scales=getattr(args, "scales", "absmax"), **quantization)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    folder = resolve_model(args.model)
    need = memory.estimate(folder, compute_bytes=dtype.itemsize, r=0, **quantization)
    memory.check_memory(need, str(device))
    with as_usage_error(), out_of_memory_as_usage_error(f"The model needs {need}"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        adapter = getattr(args, "adapter", None)
        other = adapter is not None and is_other_method(adapter)
        own = None if other else adapter
        model = load_quantized(folder, config, device=device, dtype=dtype, adapter=own, progress=sys.stderr.isatty())
        if other:
            from qlora_engine import peft

            peft.load(model, adapter)
    return model.eval(), tokenizer


def is_other_method(folder: str) -> bool:
    """Whether a folder holds what a method besides plain LoRA learnt; False where that cannot be read."""
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        return config["peft_type"] != "LORA" or bool(config.get("use_dora"))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def say(text: str) -> None:
    """Prints a line for people, beside what a command writes to standard output."""
    print(text, file=sys.stderr, flush=True)


def mib(count: int) -> str:
    """Bytes in MiB, for people."""
    return f"{count / 2**20:,.1f} MiB"
