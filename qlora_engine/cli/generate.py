"""`qlora generate`: generate text from a 4-bit model, with or without an adapter."""

import sys

from qlora_engine.cli.common import add_command, add_model_flags, add_quantization_flags, load_for_use, say
from qlora_engine.training.errors import UsageError

DESCRIPTION = """\
Generates from a prompt (--prompt, or standard input), or holds a conversation (--chat on a terminal). Text streams
to standard output as it is generated."""
EXAMPLE = """\
  qlora generate --model MODEL --adapter run/adapter --prompt "Define \\"quark\\" (noun)."
  echo "Why is the sky blue?" | qlora generate --model MODEL --chat --temperature 0.7"""


def add_parser(commands):
    """Describes the command."""
    parser = add_command(commands, "generate", "generate text", DESCRIPTION, EXAMPLE)
    add_model_flags(parser, adapter=True)
    add_quantization_flags(parser)
    parser.add_argument("--prompt", help="the prompt; without it, standard input is read")
    parser.add_argument("--chat", action="store_true", help="use the model's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens at most")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0: the most likely token, always"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="sample from the likeliest X of the mass"
    )
    parser.add_argument(
        "--top-k", type=int, default=50, metavar="N", help="sample from the N likeliest tokens; 0: all"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling")
    return parser


def run(args) -> None:
    """Runs the command."""
    _check(args)
    conversation = args.chat and args.prompt is None and sys.stdin.isatty()
    if not conversation:
        prompt = sys.stdin.read().rstrip("\n") if args.prompt is None else args.prompt
        if not prompt:
            raise UsageError("the prompt is empty; pass --prompt TEXT or write to standard input")
    model, tokenizer = load_for_use(args)
    import torch

    from qlora_engine.training.sampling import check_chat_template

    if args.chat:
        check_chat_template(tokenizer)
    torch.manual_seed(args.seed)
    if conversation:
        _converse(args, model, tokenizer)
    else:
        _answer(args, model, tokenizer, [{"role": "user", "content": prompt}] if args.chat else prompt)


def _check(args) -> None:
    for flag, value, good, words in (
        ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "at least 1"),
        ("--temperature", args.temperature, args.temperature >= 0, "at least 0"),
        ("--top-p", args.top_p, 0 < args.top_p <= 1, "more than 0 and at most 1"),
        ("--top-k", args.top_k, args.top_k >= 0, "at least 0"),
    ):
        if not good:
            raise UsageError(f"{flag} is {value}; expected {words}")


def _answer(args, model, tokenizer, prompt) -> str:
    from qlora_engine.training.errors import out_of_memory_as_usage_error
    from qlora_engine.training.sampling import stream

    pieces = []
    with out_of_memory_as_usage_error("Shorten the prompt or lower --max-new-tokens"):
        for piece in stream(
            model,
            tokenizer,
            prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
        ):
            pieces.append(piece)
            print(piece, end="", flush=True)
    print(flush=True)
    return "".join(pieces)


def _converse(args, model, tokenizer) -> None:
    say("Write a message; an empty line or Ctrl-D ends.")
    messages = []
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if not text.strip():
            return
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": _answer(args, model, tokenizer, messages)})
