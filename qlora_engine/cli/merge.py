"""`qlora merge`: put an adapter into its base model."""

from qlora_engine.cli.common import add_command, add_model_flags, add_quantization_flags, load_for_use

REPORT_FILE = "merge_report.json"
DESCRIPTION = """\
Adds an adapter to the 4-bit base it was trained on. Into 16 or 32 bits, the result is an ordinary model that
transformers loads alone; into nf4, it stays small, and the report says how much of the adapter was lost."""
EXAMPLE = "  qlora merge --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter run/adapter --output merged"


def add_parser(commands):
    """Describes the command."""
    parser = add_command(commands, "merge", "put an adapter into its base model", DESCRIPTION, EXAMPLE)
    add_model_flags(parser, adapter=False)
    parser.add_argument("--adapter", required=True, help="folder with an adapter in PEFT's format")
    add_quantization_flags(parser)
    parser.add_argument("--output", required=True, help="folder to write; older weights in it are replaced")
    parser.add_argument(
        "--into", default="bf16", choices=("bf16", "fp16", "fp32", "nf4"), help="format of the result"
    )
    parser.add_argument("--layers", action="store_true", help="print the report of every layer")
    return parser


def run(args) -> None:
    """Runs the command."""
    model, tokenizer = load_for_use(args)
    from qlora_engine.models.files import atomic_write
    from qlora_engine.models.merge import merge, save_merged
    from qlora_engine.peft import applied
    from qlora_engine.training.errors import as_usage_error, out_of_memory_as_usage_error

    with as_usage_error(), out_of_memory_as_usage_error("Merge on the CPU with --device cpu, or --into nf4."):
        for method in list(applied(model)):
            method.merge()
        report = merge(model, into=args.into)
        folder = save_merged(model, args.output, tokenizer)
    with atomic_write(folder / REPORT_FILE) as temporary:
        temporary.write_text(report.to_json() + "\n")
    print(report if args.layers else report.summary())
    print(f"written to {args.output}; what became of each layer is in {REPORT_FILE} there")
