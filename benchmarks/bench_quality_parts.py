"""What it costs a model to have its embeddings and its output head in 4 bits, beside its linear layers.

    make demo STEPS=1                      # once: SmolLM2-135M-Instruct, into .demo/
    python benchmarks/bench_quality_parts.py

The figures of bench_quality.py, perplexity and divergence from the 16-bit model, for NF4 in blocks of 64 with double
quantization. Where the model ties its head to its embeddings, as the default one does, either of them alone is
measured with a weight of its own; `mib` is then what the model takes as this package keeps it: the row of the
embeddings alone has a 16-bit head beside them, which `prepare` refuses. Computed in float32 throughout.
"""

import sys

import harness
import torch
from bench_quality import MODEL, TEXT, Reading, linear_layers, windows_of

import qlora_engine as qe

PARTS = (
    ("16-bit", (), False),
    ("linear layers", ("layers",), False),
    ("and embeddings", ("layers", "embeddings"), False),
    ("and head", ("layers", "head"), False),
    ("and both, one weight", ("layers", "embeddings", "head"), True),
)
COLUMNS = {"part": "in 4 bits", "mib": "MiB", "perplexity": "perplexity", "divergence_e3": "KL, 1e-3"}


@torch.no_grad()
def measure(model: torch.nn.Module, parts: tuple[str, ...], reading: Reading) -> dict:
    """Figures of the model with decoded weights in the place of those that `parts` names."""
    held = {id(p): 2 * p.numel() for p in model.parameters()}
    places = {"layers": list(linear_layers(model).values())}
    places |= {"embeddings": [model.get_input_embeddings()], "head": [model.get_output_embeddings()]}
    before = {}
    for layer in (layer for part in parts for layer in places[part]):
        weight = layer.weight
        if id(weight) not in before:
            before[id(weight)] = weight, weight.clone()
            w4 = qe.quantize(weight)
            held[id(weight)] = w4.nbytes
            weight.copy_(w4.dequantize(torch.float32))
    perplexity, divergence = reading(model)
    for weight, old in before.values():
        weight.copy_(old)
    mib = sum(held.values()) / 2**20
    return {"mib": mib, "perplexity": perplexity, "divergence": divergence, "divergence_e3": 1e3 * divergence}


def main():
    p = harness.parser(__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n", 1)[1])
    p.add_argument("--tokens", type=int, default=4096, help="of the text (default: %(default)s)")
    p.add_argument("--length", type=int, default=256, help="tokens of a window (default: %(default)s)")
    args = p.parse_args()
    if not (MODEL / "config.json").is_file():
        sys.exit(f"there is no model in {MODEL}; `make demo STEPS=1` makes it")
    torch.backends.cuda.matmul.allow_tf32 = False

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tied = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(args.device).eval()
    apart = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(args.device).eval()
    head = apart.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    tokens = min(args.tokens, args.length) if args.quick else args.tokens
    windows = windows_of(AutoTokenizer.from_pretrained(MODEL), TEXT, tokens, args.length).to(args.device)
    reading, rows = Reading(windows), []
    for part, quantized, one_weight in PARTS:
        either = not one_weight and bool({"embeddings", "head"} & {*quantized})
        rows.append({"part": part} | measure(apart if either else tied, quantized, reading))
    print(harness.table(rows, COLUMNS))
    setting = {"model": MODEL.name, "text": TEXT.name, "tokens": windows.numel(), "length": args.length}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"bench_quality_parts_{harness.slug(args.device)}.json"
    harness.write_json(path, args.device, rows, setting=setting)


if __name__ == "__main__":
    main()
