"""Prompt tuning (Lester et al. 2021, "The power of scale for parameter-efficient prompt tuning")."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from qlora_engine.peft.base import MethodError, register
from qlora_engine.peft.virtual_tokens import Folded, PromptMethod, VirtualTokensConfig

INITS = ("random", "vocabulary", "text")


@dataclasses.dataclass
class PromptTuning(VirtualTokensConfig):
    """Trains P virtual tokens `[P, width]` that stand before the embeddings of each text: `[prompt; E(text)]`.

    Attributes:
        num_virtual_tokens: P; with `init="text"`, 0 means as many as the text has tokens.
        train_head: see `VirtualTokensConfig`.
        init: where the virtual tokens begin.
            "random": normally distributed around 0.
            "vocabulary": at embeddings of the model's vocabulary: of `init_words`, one after the other and again from
            the first, a word of several tokens at their mean; of tokens drawn at random where none are given.
            "text": at the embeddings of `init_text`, which is repeated or cut off to P tokens.
        init_std: standard deviation of "random"; default: that of the model's embeddings.
        init_words: such as `["Summarize", "TLDR"]`.
        average: begins all virtual tokens at the mean of `init_words`.
        init_text: a text, best one that describes the task.
        tokenizer: that of the model, or the name or path of one; for words and texts. It is not saved.
    """

    name: ClassVar[str] = "prompt_tuning"
    init: str = "random"
    init_std: float | None = None
    init_words: Sequence[str] = ()
    average: bool = False
    init_text: str | None = None
    tokenizer: Any = None


@register
class PromptTuningMethod(PromptMethod):
    """Virtual tokens that are trained as they are."""

    config_class = PromptTuning
    peft_type = "PROMPT_TUNING"

    def _check_model(self) -> None:
        config: PromptTuning = self.config
        if config.init not in INITS:
            raise MethodError(f"init is {config.init!r}; expected one of {', '.join(INITS)}")
        if config.init == "text" and not config.init_text:
            raise MethodError('init="text" needs init_text')
        if config.average and not config.init_words:
            raise MethodError("average needs init_words")
        if config.init == "text" and config.num_virtual_tokens == 0:
            ids = token_ids(config.tokenizer, config.init_text)
            self.config = dataclasses.replace(config, num_virtual_tokens=len(ids))
        super()._check_model()

    def _make_encoder(self) -> nn.Module:
        config: PromptTuning = self.config
        return Folded(_INITIAL[config.init](config, self._embeddings))

    def _peft_settings(self) -> dict[str, Any]:
        return {
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "tokenizer_name_or_path": None,
            "tokenizer_kwargs": None,
        }


def token_ids(tokenizer, text: str) -> list[int]:
    """Ids of a text without special tokens.

    Args:
        tokenizer: a transformers tokenizer, or the name or path of one.

    Raises:
        MethodError: where there is no tokenizer, or the text has no tokens.
    """
    if tokenizer is None:
        raise MethodError(f"the text {text!r} needs a tokenizer: pass tokenizer, the model's own or its name")
    if isinstance(tokenizer, str):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise MethodError(f"the text {text!r} has no tokens")
    return ids


@torch.no_grad()
def word_vectors(embeddings: nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """Rows of an embedding layer, float32 `[len(ids), width]`."""
    size = embeddings.weight.shape[0]
    wrong = [i for i in ids if not 0 <= i < size]
    if wrong:
        raise MethodError(f"token {wrong[0]} is not in the model's vocabulary of {size}: another model's tokenizer?")
    return embeddings(torch.tensor(ids, device=embeddings.weight.device)).float()


def repeated(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The rows one after the other, and again from the first, until they are `count`."""
    return rows[torch.arange(count, device=rows.device) % len(rows)]


def _random(config: PromptTuning, embeddings: nn.Module) -> torch.Tensor:
    weight = embeddings.weight
    std = weight.detach().float().std() if config.init_std is None else config.init_std
    return torch.randn(config.num_virtual_tokens, weight.shape[1], device=weight.device) * std


def _vocabulary(config: PromptTuning, embeddings: nn.Module) -> torch.Tensor:
    if not config.init_words:
        drawn = torch.randint(embeddings.weight.shape[0], (config.num_virtual_tokens,))
        return word_vectors(embeddings, drawn.tolist())
    words = [config.init_words] if isinstance(config.init_words, str) else config.init_words
    means = torch.stack([word_vectors(embeddings, token_ids(config.tokenizer, word)).mean(0) for word in words])
    return repeated(means.mean(0, keepdim=True) if config.average else means, config.num_virtual_tokens)


def _text(config: PromptTuning, embeddings: nn.Module) -> torch.Tensor:
    return repeated(
        word_vectors(embeddings, token_ids(config.tokenizer, config.init_text)), config.num_virtual_tokens
    )


_INITIAL = {"random": _random, "vocabulary": _vocabulary, "text": _text}
