"""`qlora quantize`: store a model in 4 bits."""

from pathlib import Path

from qlora_engine.cli.common import add_command, add_model_flags, add_quantization_flags, load_for_use, mib

DESCRIPTION = """\
Quantizes a model's linear layers to NF4 and saves it as a folder that every command loads, in a fraction of the
time and of the disk that the 16-bit model takes. Embeddings, head and norms stay as they are, unless
--quantize-embeddings and --quantize-head are given."""
EXAMPLE = "  qlora quantize --model HuggingFaceTB/SmolLM2-135M-Instruct --output smol-nf4"


def add_parser(commands):
    """Describes the command."""
    parser = add_command(commands, "quantize", "store a model in 4 bits", DESCRIPTION, EXAMPLE)
    add_model_flags(parser, adapter=False)
    add_quantization_flags(parser)
    parser.add_argument("--output", required=True, help="folder to write; older weights in it are replaced")
    # what is not quantized is stored in this dtype, and 16 bits are what models come in
    parser.set_defaults(dtype="bf16")
    return parser


def run(args) -> None:
    """Runs the command."""
    model, tokenizer = load_for_use(args)
    from qlora_engine.models.checkpoint import save_quantized
    from qlora_engine.training.errors import as_usage_error
    from qlora_engine.training.sizes import folder_bytes, model_sizes

    with as_usage_error():
        save_quantized(model, args.output, tokenizer)
    sizes = model_sizes(model)
    print(f"in 16 bits  {mib(sizes.bytes_16bit)}")
    print(f"in 4 bits   {mib(sizes.bytes_4bit)}")
    print(f"written     {mib(folder_bytes(args.output))}  {Path(args.output)}")
