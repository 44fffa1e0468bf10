"""P-tuning (Liu et al. 2021, "GPT understands, too"): virtual tokens through a prompt encoder, and anchor tokens."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from qlora_engine.peft.base import MethodConfig, MethodError, register
from qlora_engine.peft.prompt_tuning import token_ids, word_vectors
from qlora_engine.peft.virtual_tokens import Folded, PromptMethod, VirtualTokensConfig

ENCODERS = ("lstm", "mlp", "none")


@dataclasses.dataclass
class PTuning(VirtualTokensConfig):
    """Trains P virtual tokens that a small network computes from P embeddings `e`, `[P, width]`.

    "lstm": `MLP([forward LSTM(e); backward LSTM(e)])`, equation 4 of the paper, with an MLP of two layers.
    "mlp": an MLP of three layers, on each embedding alone.
    A file holds what the encoder computes, not the encoder.

    Attributes:
        num_virtual_tokens: P; with a template, the sum of its numbers.
        train_head: see `VirtualTokensConfig`.
        encoder: "lstm", "mlp", or "none": virtual tokens that are trained as they are.
        encoder_hidden_size: width of the encoder inside; default: that of the model's embeddings.
        encoder_num_layers: layers of the LSTM.
        encoder_dropout: between the layers of the LSTM, in training.
        template: what stands before the text, in order: a number is as many virtual tokens; a string, or a list of
            token ids, is fixed (anchor) tokens of the vocabulary. `[3, "It was", 2]` is three virtual tokens, the
            anchors, and two virtual tokens. Default: virtual tokens alone. PEFT has no templates: such an adapter
            is saved in this package's own format.
        tokenizer: that of the model, or the name or path of one; for strings in the template. It is not saved.
    """

    name: ClassVar[str] = "p_tuning"
    encoder: str = "lstm"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    template: Sequence[int | str | Sequence[int]] = ()
    tokenizer: Any = None


class PromptEncoder(nn.Module):
    """P embeddings and the network on them.

    Args:
        count: P.
        width: of the model's embeddings.
        config: settings; `encoder` is "lstm" or "mlp".
        std: standard deviation with which the embeddings begin.
    """

    def __init__(self, count: int, width: int, config: PTuning, std: float):
        super().__init__()
        hidden = config.encoder_hidden_size or width
        self.embedding = nn.Embedding(count, width)
        nn.init.normal_(self.embedding.weight, std=std)
        self.lstm = None
        if config.encoder == "lstm":
            layers = config.encoder_num_layers
            dropout = config.encoder_dropout if layers > 1 else 0.0
            self.lstm = nn.LSTM(width, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
        else:
            self.mlp = nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
            )

    def forward(self) -> torch.Tensor:
        """The virtual tokens, `[P, width]`."""
        values = self.embedding.weight
        if self.lstm is not None:
            values = self.lstm(values[None])[0][0]
        return self.mlp(values)


@register
class PTuningMethod(PromptMethod):
    """Virtual tokens and anchors before the input embeddings."""

    config_class = PTuning
    peft_type = "P_TUNING"

    def _check_model(self) -> None:
        config: PTuning = self.config
        if config.encoder not in ENCODERS:
            raise MethodError(f"encoder is {config.encoder!r}; expected one of {', '.join(ENCODERS)}")
        for name in ("encoder_hidden_size", "encoder_num_layers"):
            value = getattr(config, name)
            if value is not None and value < 1:
                raise MethodError(f"{name} is {value}; expected at least 1")
        # [virtual tokens or ids of anchors, ...]
        self._template = [self._part(part) for part in config.template] or [config.num_virtual_tokens]
        count = sum(part for part in self._template if isinstance(part, int))
        self.config = dataclasses.replace(config, num_virtual_tokens=count)
        super()._check_model()

    def _part(self, part) -> int | list[int]:
        if isinstance(part, str):
            return token_ids(self.config.tokenizer, part)
        if isinstance(part, int) and part < 1:
            raise MethodError(f"the template asks for {part} virtual tokens; expected at least 1")
        return part if isinstance(part, int) else list(part)

    def _length(self) -> int:
        return sum(part if isinstance(part, int) else len(part) for part in self._template)

    def _make_encoder(self) -> nn.Module:
        config: PTuning = self.config
        for part in self._template:
            if not isinstance(part, int):
                word_vectors(self._embeddings, part)  # raises where the vocabulary lacks one
        weight = self._embeddings.weight
        std = weight.detach().float().std().item()
        if config.encoder == "none":
            return Folded(torch.randn(config.num_virtual_tokens, self._width) * std)
        return PromptEncoder(config.num_virtual_tokens, self._width, config, std)

    def rows(self) -> torch.Tensor:
        """Virtual tokens and anchors in the template's order, `[length, width]`."""
        virtual = self.encode()
        if self._template == [len(virtual)]:
            return virtual
        parts, used = [], 0
        for part in self._template:
            if isinstance(part, int):
                parts.append(virtual[used : used + part])
                used += part
            else:
                parts.append(word_vectors(self._embeddings, part).to(virtual.device, virtual.dtype))
        return torch.cat(parts)

    def _folded_config(self) -> MethodConfig:
        template = self._template if self.config.template else []
        return dataclasses.replace(super()._folded_config(), encoder="none", template=template)

    def to_peft(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        return None if self.config.template else super().to_peft()

    def _peft_settings(self) -> dict[str, Any]:
        config: PTuning = self.config
        return {
            "encoder_reparameterization_type": "LSTM" if config.encoder == "lstm" else "MLP",
            "encoder_hidden_size": config.encoder_hidden_size or self._width,
            "encoder_num_layers": config.encoder_num_layers,
            "encoder_dropout": config.encoder_dropout,
        }

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[MethodConfig, dict]:
        settings, named = super().from_peft(config, tensors)
        return dataclasses.replace(settings, encoder="none"), named
