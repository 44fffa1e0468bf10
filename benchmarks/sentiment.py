"""The movie sentiment set, and a language model as its classifier.

10,605 snippets of film reviews, each rated from -4 to 4 by twenty people (Hutto & Gilbert 2014, "VADER"). They come
in the source package of vadersentiment 3.3.2 and are not part of this repository:

    pip download --no-deps --no-binary :all: --dest .demo vadersentiment==3.3.2
"""

import hashlib
import io
import random
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

PACKAGE = "vaderSentiment-3.3.2"
INNER, RATINGS = "hutto_ICWSM_2014.tar.gz", "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
DEFAULT_PATH = Path(__file__).resolve().parents[1] / ".demo" / f"{PACKAGE}.tar.gz"
SURE = 1.0  # ratings nearer to zero than this are neither positive nor negative
LENGTHS = (20, 220)  # characters
PROMPT = "Review: {}\nSentiment:"
WORDS = (" negative", " positive")

Row = tuple[str, int]  # a review, and 0 (negative) or 1 (positive)


def read(path: Path) -> list[Row]:
    """Reviews that are clearly positive or negative, each once, in an order that depends on nothing but their text.

    Args:
        path: the source package, a .tar.gz file.

    Raises:
        SystemExit: where it is not there, or not that package.
    """
    if not path.is_file():
        sys.exit(
            f"the sentiment set {path} is missing; get it with: pip download --no-deps --no-binary :all: "
            f"--dest {path.parent} vadersentiment==3.3.2"
        )
    try:
        with tarfile.open(path) as package:
            inner = package.extractfile(f"{PACKAGE}/additional_resources/{INNER}").read()
        with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
            text = archive.extractfile(RATINGS).read().decode("utf-8")
    except (tarfile.TarError, KeyError) as error:
        sys.exit(f"{path} is not the source package of vadersentiment 3.3.2: {error}")
    found = {}
    for line in text.splitlines():
        _, rating, review = line.split("\t", 2)
        review = review.strip()
        if abs(float(rating)) > SURE and LENGTHS[0] <= len(review) <= LENGTHS[1]:
            found.setdefault(review, int(float(rating) > 0))
    return sorted(found.items(), key=lambda row: hashlib.sha256(row[0].encode()).digest())


def split(rows: list[Row], held_out: int) -> tuple[list[Row], list[Row]]:
    """(training rows, the first `held_out` rows)"""
    if not 0 < held_out < len(rows):
        sys.exit(f"{held_out} of {len(rows)} reviews cannot be held out")
    return rows[held_out:], rows[:held_out]


class Task:
    """Reviews as batches for a causal language model, its loss, and its accuracy.

    The model says the next word after the prompt; of the two label words the likelier one is its answer. Prompts end
    at the last position, padded on the left, so that only that position's logits are computed.

    Args:
        tokenizer: of the model; must have each label word as one token.
        device: where batches go.
        words: label words of the classes 0 and 1.
    """

    def __init__(self, tokenizer, device: torch.device | str, words: tuple[str, str] = WORDS):
        self.tokenizer, self.device = tokenizer, device
        ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        if any(len(word) != 1 for word in ids):
            sys.exit(f"the tokenizer does not have each of {words} as one token")
        self.labels = torch.tensor([word[0] for word in ids], device=device)
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._padding = 0 if padding is None else padding
        self._tokens: dict[str, list[int]] = {}

    def batch(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        """Token ids, mask and positions `[rows, longest prompt]`, and the class of each row as `answer`."""
        fresh = [review for review, _ in rows if review not in self._tokens]
        if fresh:
            prompts = self.tokenizer([PROMPT.format(review) for review in fresh])["input_ids"]
            self._tokens.update(zip(fresh, prompts, strict=True))
        tokens = [self._tokens[review] for review, _ in rows]
        width = max(map(len, tokens))
        ids = torch.tensor([[self._padding] * (width - len(row)) + row for row in tokens])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in tokens])
        positions = (mask.cumsum(1) - 1).clamp_(min=0)
        answer = torch.tensor([label for _, label in rows])
        found = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "answer": answer}
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in found.items()}

    def training_batches(self, rows: list[Row], size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches without end, the rows in a new order each time around."""
        draw = random.Random(seed)
        while True:
            order = draw.sample(range(len(rows)), len(rows))
            for start in range(0, len(order) - size + 1, size):
                yield self.batch([rows[i] for i in order[start : start + size]])

    def logits(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32 `[rows, vocabulary]`: of the word behind the prompt."""
        given = {name: tensor for name, tensor in batch.items() if name != "answer"}
        return model(**given, logits_to_keep=1, use_cache=False).logits[:, -1].float()

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean negative log-likelihood of the right word among the whole vocabulary."""
        return F.cross_entropy(self.logits(model, batch), self.labels[batch["answer"]])

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module, rows: list[Row], size: int) -> tuple[float, float]:
        """(mean loss, share of right answers) over rows; batches of `size` of about the same length."""
        ordered = sorted(rows, key=lambda row: len(row[0]))
        loss = right = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in range(0, len(ordered), size):
            batch = self.batch(ordered[start : start + size])
            logits, answer = self.logits(model, batch), batch["answer"]
            loss = loss + F.cross_entropy(logits, self.labels[answer], reduction="sum").double()
            right = right + (logits[:, self.labels].argmax(1) == answer).sum()
        return float(loss / len(rows)), float(right / len(rows))
