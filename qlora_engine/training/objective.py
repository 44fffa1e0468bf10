"""What a run's steps minimise. `NextToken` is the ordinary loss of a language model; `preferences.py` has the other.

An objective makes the trainer's data out of rows, the loss out of a batch, and the figures that are logged beside it.
"""

import abc
from pathlib import Path

import torch

from qlora_engine.training.data import Rows
from qlora_engine.training.loss import CausalLoss, causal_lm_loss
from qlora_engine.training.options import FinetuneOptions

# figures of preferences, by TRL's names: means of both answers' rewards and of their difference; how often it is
# positive, where a tie counts half
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


class Objective(abc.ABC):
    """One kind of training.

    Attributes:
        collator: what makes batches of the dataset's rows; None for TRL's.
    """

    collator = None

    @abc.abstractmethod
    def settings(self, rows: Rows) -> dict:
        """Arguments of TRL's SFTConfig."""

    @abc.abstractmethod
    def dataset(self, rows: Rows):
        """Rows as the `datasets.Dataset` that the trainer is given."""

    def prepare(self, trainer, folder: Path) -> None:  # noqa: B027 - the ordinary objective has nothing to prepare
        """Computes what is needed of the model as it came, before it is trained; it may be kept in `folder`.

        Every process calls this.
        """

    @abc.abstractmethod
    def loss(self, trainer, model: torch.nn.Module, inputs: dict, num_items) -> torch.Tensor:
        """Loss of a batch, a scalar; with a graph where gradients are on.

        Args:
            trainer: the `QLoRATrainer`.
            model: its model, or what wraps it in several processes.
            inputs: the batch.
            num_items: tokens with a label in all batches of the step, where transformers counted them.
        """

    @abc.abstractmethod
    def take(self, training: bool) -> tuple[dict[str, list[float]], int | None]:
        """Figures of the batches since the last call, to be averaged, and how many tokens they had.

        Args:
            training: whether of batches that were trained on, or of those that were evaluated.

        Returns:
            Names with figures; the tokens, or None where TRL counts them.
        """

    @abc.abstractmethod
    def as_model_inputs(self, batch: dict) -> dict:
        """A batch as the model itself takes it with its loss, for methods that choose by it what they train."""


class NextToken(Objective):
    """Each token from those before it.

    The training loss is this engine's chunked one where the trainer says so (`own_loss`), else TRL's.
    """

    def __init__(self, options: FinetuneOptions):
        self.options = options
        self.counts = TokenCounts()

    def settings(self, rows: Rows) -> dict:
        options = self.options
        return {
            "max_length": options.max_length,
            "packing": options.packing,
            "eval_packing": False,  # so that the held-out loss does not depend on it
            "completion_only_loss": options.completion_only and rows.format == "prompt/completion",
            "assistant_only_loss": options.assistant_only,
        }

    def dataset(self, rows: Rows):
        return rows.dataset()

    def loss(self, trainer, model, inputs, num_items):
        if not (trainer.own_loss and model is trainer.model and model.training):
            return trainer.trl_loss(model, inputs, num_items)
        with trainer.own_pass(inputs) as given:
            own = causal_lm_loss(model, num_items=num_items, **given)
        self.counts.add(own, inputs)
        return own.loss

    def take(self, training):
        counts = self.counts.take() if training else []
        if not counts:
            return {}, None
        accuracies = [correct / max(1, count) for correct, count, _ in counts]
        return {"mean_token_accuracy": accuracies}, sum(real for *_, real in counts)

    def as_model_inputs(self, batch):
        return batch


class TokenCounts:
    """Correct, counted and real tokens of batches, kept on their device until somebody asks."""

    def __init__(self):
        self.waiting: list[torch.Tensor] = []

    def add(self, found: CausalLoss, inputs: dict[str, torch.Tensor]) -> None:
        mask = inputs.get("attention_mask")
        real = found.count.new_tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
        self.waiting.append(torch.stack((found.correct, found.count, real)).detach())

    def take(self) -> list[list[int]]:
        """Those of every batch since the last call; waits for the GPU."""
        counts, self.waiting = self.waiting, []
        return torch.stack(counts).tolist() if counts else []
