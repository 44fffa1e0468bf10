"""P-tuning v2 (Liu et al. 2022, "P-tuning v2: Prompt tuning can be comparable to fine-tuning universally ...")."""

import dataclasses
from typing import Any, ClassVar

import torch

from qlora_engine.peft.base import METHOD_KEY, register
from qlora_engine.peft.prefix_tuning import PrefixTuning, PrefixTuningMethod


@dataclasses.dataclass
class PTuningV2(PrefixTuning):
    """Trains deep prompts, P in each layer, with a classification head where the model has one.

    A prompt in a layer is a key and a value (see `PrefixTuning`, whose formula this is). The paper makes of it a
    method for understanding: for models that read in both directions, with a linear head on the first token instead
    of words that stand for labels, and with the reparametrisation left to the task. Causal models carry it as well.

    Attributes:
        num_virtual_tokens: P; the paper takes under 20 for classification, and around 100 for tagging sequences.
        train_head: trains the head; False leaves it as it is.
        reparametrise: the MLP, which helps some tasks and harms others.
        encoder_hidden_size, init, init_std, init_text, tokenizer: see `PrefixTuning`.
    """

    name: ClassVar[str] = "p_tuning_v2"


@register
class PTuningV2Method(PrefixTuningMethod):
    """PEFT knows it as prefix tuning: a file says in a key of its own which one it was."""

    config_class = PTuningV2

    def to_peft(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        config, tensors = super().to_peft()
        return config | {METHOD_KEY: self.name}, tensors
