"""Direct preference optimisation: of two answers to a prompt, the preferred one is made more likely than the other.

Rafailov et al. 2023 (arXiv 2305.18290), equation 7: with the rewards r = beta (log p - log p_ref) of the two answers
the loss of a pair is -log sigmoid(r_chosen - r_rejected). p_ref is the same 4-bit base without what is trained; its
log-probabilities do not change and are computed once (`reference.py`).
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from qlora_engine.training.data import Rows
from qlora_engine.training.loss import IGNORED, sequence_log_probs
from qlora_engine.training.objective import REWARDS, Objective
from qlora_engine.training.options import FinetuneOptions
from qlora_engine.training.pairs import PairCollator, pair_dataset
from qlora_engine.training.reference import add_reference


class PreferenceLoss(NamedTuple):
    """What a batch of B pairs gave.

    Attributes:
        loss: mean over the pairs, a scalar with a graph.
        rewards: float32 `[B, 2]` of chosen and rejected answers, without a graph.
    """

    loss: torch.Tensor
    rewards: torch.Tensor


def preference_loss(
    log_probs: torch.Tensor,
    reference: torch.Tensor,
    lengths: torch.Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> PreferenceLoss:
    """The loss of pairs of answers from their log-probabilities.

    Args:
        log_probs: float32 `[B, 2]`, of the chosen and the rejected answers by the model.
        reference: float32 `[B, 2]`, by the reference model.
        lengths: `[B, 2]`, tokens of the answers.
        beta: how strongly the model is held to the reference.
        loss_type: "sigmoid", or "ipo": (d - 1 / (2 beta))^2 where d is the difference of the answers' mean log-ratios
            a token (Azar et al. 2023, arXiv 2310.12036, equation 17, over lengths as in TRL).
        label_smoothing: probability that a pair is the wrong way around ("conservative" DPO, Mitchell 2023).
        sft_weight: factor of the chosen answer's negative log-probability a token, which is added (Pang et al. 2024,
            arXiv 2404.19733, equation 1, whose alpha is the inverse).

    >>> pairs = torch.tensor([[-5.0, -7.0]]), torch.tensor([[-6.0, -6.0]])
    >>> found = preference_loss(*pairs, torch.tensor([[4, 4]]), beta=0.5)
    >>> found.rewards.tolist(), round(float(found.loss), 4)
    ([[0.5, -0.5]], 0.3133)
    """
    ratios = log_probs - reference
    if loss_type == "ipo":
        chosen, rejected = (ratios / lengths.clamp(min=1)).unbind(1)
        losses = (chosen - rejected - 1 / (2 * beta)).square()
    else:
        margins = beta * (ratios[:, 0] - ratios[:, 1])
        losses = -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
    if sft_weight:
        losses = losses - sft_weight * log_probs[:, 0] / lengths[:, 0].clamp(min=1)
    return PreferenceLoss(losses.mean(), beta * ratios.detach())


class Preferences(Objective):
    """Prefers the chosen answer to the rejected one.

    Args:
        options: of the run.
        tokenizer: of the model.
    """

    def __init__(self, options: FinetuneOptions, tokenizer):
        self.options, self.tokenizer = options, tokenizer
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.collator = PairCollator(padding)
        self.waiting: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    def settings(self, rows: Rows) -> dict:
        return {
            "completion_only_loss": False,  # what counts is in the batches
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "remove_unused_columns": False,
        }

    def dataset(self, rows: Rows):
        return pair_dataset(rows, self.tokenizer, self.options.max_length)

    def prepare(self, trainer, folder: Path) -> None:
        add_reference(trainer, folder, lambda batch: self.log_probs(trainer, trainer.model, batch)[0])

    def log_probs(self, trainer, model, batch) -> tuple[torch.Tensor, torch.Tensor | float]:
        """(log-probabilities of a batch's answers, float32 `[B, 2]`; what the model adds to its loss by itself)"""
        flat = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "targets")}
        labels, extra = flat.pop("targets"), 0.0
        if trainer.own_loss and model is trainer.model:
            with trainer.own_pass(flat) as given:
                found = sequence_log_probs(model, labels=labels, **given)
        else:
            with trainer.accelerator.autocast():
                output = model(**flat, labels=labels, fused_lm_head=True)
            found = output.log_probs.float().sum(1)  # 0 where there is no label
            if trainer.aux_loss_enabled:  # experts are to be used evenly
                extra = trainer.router_aux_loss_coef * output.aux_loss
        return found.reshape(batch["input_ids"].shape[:2]), extra

    def loss(self, trainer, model, inputs, num_items):
        log_probs, extra = self.log_probs(trainer, model, inputs)
        found = preference_loss(
            log_probs,
            inputs["reference"],
            (inputs["targets"][..., 1:] != IGNORED).sum(-1),
            beta=self.options.beta,
            loss_type=self.options.loss_type,
            label_smoothing=self.options.label_smoothing,
            sft_weight=self.options.sft_weight,
        )
        tokens = inputs["attention_mask"].sum((1, 2))
        figures = torch.cat((found.rewards, tokens.unsqueeze(1)), dim=1)
        self.waiting[trainer.model.training].append(trainer.accelerator.gather_for_metrics(figures))
        return found.loss + extra

    def take(self, training):
        batches, self.waiting[training] = self.waiting[training], []
        if not batches:
            return {}, None
        chosen, rejected, tokens = torch.cat(batches).double().cpu().unbind(1)
        margins = chosen - rejected
        right = (margins.sign() + 1) / 2  # a tie, as all are before training, counts half
        means = [t.mean().item() for t in (chosen, rejected, margins, right)]
        figures = dict(zip(REWARDS, ([mean] for mean in means), strict=True))
        return figures, int(tokens.sum()) if training else None

    def as_model_inputs(self, batch):
        """The chosen answers behind their prompts."""
        chosen = {name: batch[name][:, 0] for name in ("input_ids", "attention_mask")}
        return chosen | {"labels": batch["targets"][:, 0]}
