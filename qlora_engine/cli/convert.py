"""`qlora convert`: turn a GGUF file into an ordinary model folder."""

from qlora_engine.cli.common import add_command, mib, prepare_libraries, require
from qlora_engine.training.errors import ModelError, as_usage_error

DESCRIPTION = """\
Dequantizes a GGUF file once and writes config.json, safetensors and tokenizer files. The other commands do this by
themselves for a GGUF file given as --model, and keep the result in a cache ($QLORA_ENGINE_CACHE)."""
EXAMPLE = "  qlora convert model.Q4_1.gguf model-folder"


def add_parser(commands):
    """Describes the command."""
    parser = add_command(commands, "convert", "turn a GGUF file into a model folder", DESCRIPTION, EXAMPLE)
    parser.add_argument("source", help="a .gguf file, or a folder that holds one")
    parser.add_argument("output", help="folder to write; older weights in it are replaced")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"), help="dtype of the weights")
    return parser


def run(args) -> None:
    """Runs the command."""
    require(("transformers", "gguf"))
    prepare_libraries(args.source, args.debug)
    from qlora_engine.models.gguf import convert_gguf
    from qlora_engine.training.sizes import folder_bytes

    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    with as_usage_error(ModelError):
        folder = convert_gguf(args.source, args.output, names[args.dtype])
    print(f"written {mib(folder_bytes(folder))}  {folder}")
