"""What 4 bits cost a real model: error of the weights, and of the model's predictions, for every format.

    make demo STEPS=1                      # once: SmolLM2-135M-Instruct, into .demo/
    python benchmarks/bench_quality.py

Every linear layer except the head is exchanged for what a format makes of its weight: NF4 with its three kinds of
scales, FP4 and 4-bit integers, block sizes, single and double quantization; and NF4 with a 16-bit branch beside it
that takes up what quantization lost (LoftQ) or the largest singular vectors (PiSSA). Four figures tell what that
does: the mean squared error of a weight, relative to the mean square of the weights of its layer, and averaged over
all weights; stored bits a weight, branches included; perplexity on held-out text, definitions from WordNet, which the
model was not fine-tuned on; and the Kullback-Leibler divergence of the model's predictions from those of the 16-bit
model, which sees differences that perplexity hides in its noise. Computed in float32 throughout.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import harness
import torch
import torch.nn.functional as F
from quality_formats import FORMATS, Branches, Stored

MODEL = harness.ROOT / ".demo" / "SmolLM2-135M-Instruct"
TEXT = harness.ROOT / "demo" / "wordnet_definitions.jsonl"
CHUNK = 512  # positions whose predictions are compared at a time


@dataclasses.dataclass
class Reading:
    """Predictions of the 16-bit model on the text, to compare others with.

    Attributes:
        windows: token ids `[windows, length]`.
        log_probabilities: float16 `[windows, length - 1, vocabulary]`, in CPU memory; None until the first reading.
    """

    windows: torch.Tensor
    log_probabilities: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module) -> tuple[float, float]:
        """(perplexity, mean divergence from the first model that read, in nats a token)"""
        first = self.log_probabilities is None
        loss = divergence = 0.0
        kept = []
        for number, window in enumerate(self.windows):
            logits = model(window[None], use_cache=False).logits[0, :-1].float()
            loss += float(F.cross_entropy(logits, window[1:], reduction="sum"))
            for start in range(0, len(logits), CHUNK):
                ours = logits[start : start + CHUNK].log_softmax(-1)
                if first:
                    kept.append(ours.half().cpu())
                else:
                    theirs = self.log_probabilities[number, start : start + CHUNK].to(ours.device, torch.float32)
                    divergence += float((theirs.exp() * (theirs - ours)).sum())
        count = self.windows.shape[0] * (self.windows.shape[1] - 1)
        if first:
            self.log_probabilities = torch.cat(kept).unflatten(0, (len(self.windows), -1))
        return math.exp(loss / count), divergence / count


def windows_of(tokenizer, path: Path, tokens: int, length: int) -> torch.Tensor:
    """The text's beginning as token ids `[windows, length]`, `tokens` of them or a little less."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    text = "\n".join(row["prompt"] + row["completion"] for row in rows)
    ids = tokenizer(text[: 16 * tokens])["input_ids"][: tokens // length * length]
    if len(ids) < max(length, 2):
        sys.exit(f"{path} holds {len(ids)} tokens; expected at least {length}")
    return torch.tensor(ids).unflatten(0, (-1, length))


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """All linear layers but the output head."""
    head = model.get_output_embeddings()
    return {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}


@torch.no_grad()
def measure(
    layers: dict[str, torch.nn.Linear],
    weights: dict[str, torch.Tensor],
    stored: Callable[[str, torch.Tensor], Stored],
    read: Callable[[], tuple[float, float]],
) -> dict:
    """Figures of a format, whose decoded weights take the place of the layers' meanwhile.

    Args:
        layers: path -> layer of the model.
        weights: path -> its float32 weight.
        stored: what the format makes of a layer's path and weight.
        read: perplexity and divergence of the model as it is.
    """
    error = squares = bits = count = 0.0
    for path, weight in weights.items():
        found = stored(path, weight)
        layers[path].weight.copy_(found.decoded)
        error += float((found.decoded - weight).double().square().sum())
        squares += float(weight.double().square().sum())
        bits += found.bits
        count += weight.numel()
    perplexity, divergence = read()
    for path, weight in weights.items():
        layers[path].weight.copy_(weight)
    return {
        "mse": error / count,
        "relative_mse": error / squares,
        "bits_per_weight": bits / count,
        "perplexity": perplexity,
        "divergence": divergence,
    }


def columns() -> dict[str, str]:
    """Keys of the rows and their headings."""
    return {
        "format": "format",
        "block": "block",
        "scales": "scales",
        "bits_per_weight": "bits",
        "mse_e6": "MSE, 1e-6",
        "percent": "MSE, % of W²",
        "perplexity": "perplexity",
        "divergence_e3": "KL, 1e-3",
    }


def shown(row: dict) -> dict:
    """A row with its errors in units that a table has room for."""
    return row | {
        "mse_e6": 1e6 * row["mse"],
        "percent": 100 * row["relative_mse"],
        "divergence_e3": 1e3 * row["divergence"],
    }


def draw(path: Path, rows: list[dict], title: str) -> None:
    """Divergence against stored bits, a series a family of formats; and against the weights' error."""

    def picture(plt):
        fig, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
        families = list(dict.fromkeys(row["family"] for row in rows if row["divergence"]))
        for number, family in enumerate(families):
            found = sorted((r for r in rows if r["family"] == family), key=lambda r: r["bits_per_weight"])
            style = {"color": f"C{number % 10}", "marker": "os^Dv*PX"[number % 8], "ms": 5, "lw": 1}
            for ax, key in zip(axes, ("bits_per_weight", "relative_mse"), strict=True):
                scale = 100 if key == "relative_mse" else 1
                ax.plot([scale * r[key] for r in found], [r["divergence"] for r in found], label=family, **style)
        for ax, label in zip(axes, ("stored bits a weight", "mean squared error, % of the weights'"), strict=True):
            ax.set_xlabel(label)
            ax.set_ylabel("divergence from the 16-bit model, nats a token")
            ax.set_yscale("log")
            ax.grid(alpha=0.3)
        axes[0].legend(fontsize=7)
        fig.suptitle(title, fontsize=10)
        return fig

    harness.figure(path, picture)


def main():
    p = harness.parser(__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n", 1)[1])
    p.add_argument("--model", type=Path, default=MODEL, help="folder of a causal language model")
    p.add_argument("--text", type=Path, default=TEXT, help="JSON lines with `prompt` and `completion`")
    p.add_argument("--tokens", type=int, default=4096, help="of the text (default: %(default)s)")
    p.add_argument("--length", type=int, default=256, help="tokens of a window (default: %(default)s)")
    args = p.parse_args()
    if not (args.model / "config.json").is_file():
        sys.exit(f"there is no model in {args.model}; `make demo STEPS=1` makes the default, --model names another")
    torch.backends.cuda.matmul.allow_tf32 = False

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    tokens = min(args.tokens, args.length) if args.quick else args.tokens
    windows = windows_of(AutoTokenizer.from_pretrained(args.model), args.text, tokens, args.length).to(args.device)
    layers = linear_layers(model)
    weights = {path: layer.weight.detach().clone() for path, layer in layers.items()}
    reading = Reading(windows)
    began = time.perf_counter()
    perplexity, _ = reading(model)
    rows = [
        {"family": "16-bit", "format": "16-bit", "mse": 0.0, "relative_mse": 0.0}
        | {"bits_per_weight": 16.0, "perplexity": perplexity, "divergence": 0.0}
    ]
    path = args.out / f"bench_quality_{harness.slug(args.device)}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    setting = {"model": args.model.name, "text": args.text.name, "tokens": windows.numel(), "length": args.length}
    branches = Branches()
    for number, entry in enumerate(chosen(args.quick), 1):
        stored = branches(entry) if entry.rank else entry.stored
        row = dataclasses.asdict(entry) | measure(layers, weights, stored, lambda: reading(model))
        rows.append(row)
        harness.write_json(path, args.device, rows, say=False, setting=setting)
        print(
            f"[{number}, {time.perf_counter() - began:.0f} s] {entry.format}: perplexity {row['perplexity']:.3f}, "
            f"divergence {row['divergence']:.5f}",
            flush=True,
        )
    print(harness.table([shown(row) for row in rows], columns()))
    print(f"results in {path}")
    draw(path.with_suffix(".png"), rows, f"{args.model.name}: {windows.numel():,} tokens of {args.text.name}")


def chosen(quick: bool) -> Iterable:
    """All formats, or one of each family."""
    if not quick:
        return FORMATS
    return list({entry.family: entry for entry in reversed(FORMATS)}.values())[::-1]


if __name__ == "__main__":
    main()
