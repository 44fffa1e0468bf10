"""Virtual tokens: what prompt tuning, P-tuning, prefix tuning and P-tuning v2 share.

A model sees P virtual tokens before each text. They are either P more rows of its input (`PromptMethod`), or P more
keys and values in each layer (`prefix_tuning`). Callers go on passing the text alone: a hook before the model's
forward pass extends the attention mask, the position ids, the labels and the token types, and a hook behind it takes
the virtual positions out of the logits, so that these are the text's again. `generate` needs no more than that,
because the virtual tokens enter with the first pass and stay in the cache.
"""

import abc
import dataclasses
import inspect
from typing import Any, ClassVar

import torch
from torch import nn

from qlora_engine.models.peft_format import HEADS, TASKS
from qlora_engine.nn import NF4Embedding, NF4Linear
from qlora_engine.peft.base import Method, MethodConfig, MethodError, applied
from qlora_engine.peft.values import TrainedValues

IGNORED = -100  # label that a loss leaves out
FOLDED = "prompt_embeddings"  # PEFT's name, in files, of what a prompt encoder computes
_PEFT_PREFIX = "base_model."  # of the head's tensors in PEFT's files
_PER_POSITION = ("logits", "start_logits", "end_logits", "last_hidden_state")

# What models call their cache of keys and values: transformers 5.24 renamed it
CACHE_NAMES = ("cache", "past_key_values")


def cache_name(forward) -> str:
    """What a model's `forward` calls its cache; where it only passes it on, what this transformers calls it."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    names = [*inspect.signature(forward).parameters, *(f.name for f in dataclasses.fields(BaseModelOutputWithPast))]
    return next(name for name in names if name in CACHE_NAMES)


@dataclasses.dataclass
class VirtualTokensConfig(MethodConfig):
    """Settings of all methods with virtual tokens.

    Attributes:
        num_virtual_tokens: P; all of them, and the text, must fit into the model's context.
        train_head: trains the classification head as well, where the model has one, as PEFT does.
    """

    num_virtual_tokens: int = 20
    train_head: bool = True


class VirtualTokensMethod(Method):
    """Hooks around a model's forward pass, a module that computes the virtual tokens, and a head.

    A subclass writes `_make_encoder` and `_place`; where PEFT has the method, `_peft_settings`.
    """

    config: VirtualTokensConfig

    @abc.abstractmethod
    def _make_encoder(self) -> nn.Module:
        """The module that computes the virtual tokens, of no arguments; float32, on any device.

        Raises:
            MethodError: where settings do not fit the model.
        """

    @abc.abstractmethod
    def _place(self, given: dict[str, Any], batch: int) -> int:
        """Puts the virtual tokens into the arguments of a first forward pass; returns how many rows of input."""

    def _check_model(self) -> None:
        model, config = self.model, self.config
        kind = type(model).__name__
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        if getattr(model, "config", None) is None or not isinstance(embeddings, nn.Module):
            raise MethodError(f"{config.name} needs a transformers model with input embeddings; {kind} has none")
        if getattr(model.config, "is_encoder_decoder", False):
            raise MethodError(
                f"{config.name} puts virtual tokens before one text; {kind} is an encoder and a decoder. "
                "Methods that change layers, such as BitFit, can be applied to it"
            )
        if isinstance(embeddings, NF4Embedding):
            raise MethodError(
                f"{config.name} begins at embeddings in 16 bits; prepare {kind} without quantize_embeddings"
            )
        other = next((m for m in applied(model) if isinstance(m, VirtualTokensMethod)), None)
        if other is not None:
            raise MethodError(f"{kind} has the virtual tokens of {other.name} already; remove them first")
        if config.num_virtual_tokens < 1:
            raise MethodError(f"num_virtual_tokens is {config.num_virtual_tokens}; expected at least 1")

    def _install(self) -> None:
        self._check_model()
        model = self.model
        self._embeddings = model.get_input_embeddings()
        self._text_config = model.config.get_text_config()
        self._width = self._embeddings.weight.shape[1]
        self._arguments = [p.name for p in inspect.signature(model.forward).parameters.values()]
        self._cache = cache_name(model.forward)
        context = getattr(self._text_config, "max_position_embeddings", None)
        self._task = next((t for end, t in TASKS.items() if type(model).__name__.endswith(end)), None)
        heads = self._find_heads() if self.config.train_head else {}
        encoder = self._make_encoder()
        self._count = self._length()
        if context is not None and self._count >= context:
            raise MethodError(
                f"{self._count} virtual tokens leave no room for a text: the context of {type(model).__name__} is "
                f"{context} tokens; ask for at most {context - 1}"
            )
        rotary = any(key.startswith("rope") for key in self._text_config.to_dict())
        self._limit = None if rotary else context  # learned position embeddings end; rotary ones do not
        self._encoder_name = f"qlora_{self.name}"
        model.add_module(self._encoder_name, encoder.to(self._embeddings.weight.device))
        self._head = TrainedValues(heads)
        self._rows = self._sequence = 0  # virtual rows, and all rows, of input in the forward pass under way
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def _length(self) -> int:
        """Positions before the text: virtual tokens and what stands between them."""
        return self.config.num_virtual_tokens

    def _find_heads(self) -> dict[str, tuple[nn.Module, str]]:
        names = HEADS.get(self._task, ())
        found = {}
        for path, module in self.model.named_modules():
            if path.split(".")[0] not in names:
                continue
            if isinstance(module, NF4Linear):
                raise MethodError(
                    f"the head {path} is in 4 bits and cannot be trained; prepare the model without it "
                    f"(skip_modules), or set train_head=False"
                )
            for name, _ in module.named_parameters(recurse=False):
                found[f"{path}.{name}"] = (module, name)
        return found

    def _uninstall(self) -> None:
        for handle in self._handles:
            handle.remove()
        delattr(self.model, self._encoder_name)
        self._head.restore()

    def _switch(self, enabled: bool) -> None:
        self._head.swap()

    @property
    def _encoder(self) -> nn.Module:
        return getattr(self.model, self._encoder_name)

    def encode(self) -> torch.Tensor:
        """What the encoder computes, in its own precision: autocast is off inside. `[P, ...]`"""
        with torch.autocast(self._embeddings.weight.device.type, enabled=False):
            return self._encoder()

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self._encoder.named_parameters()) | self._head.parameters()

    # Hooks

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        if not self.enabled:
            return None
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        for name in CACHE_NAMES:
            if name != self._cache and given.get(name) is not None:
                given[self._cache] = given.pop(name)
        text = given.get("input_ids")
        text = given.get("inputs_embeds") if text is None else text
        if text is None:
            return None  # the model says what it misses
        batch, length = text.shape[:2]
        cache, mask = given.get(self._cache), given.get("attention_mask")
        if getattr(cache, "is_compileable", False) or (mask is not None and mask.ndim != 2):
            raise MethodError(
                f"{self.name} extends attention masks of [batch, tokens] and caches that grow; for a static cache or "
                "a mask of other dimensions it cannot. Generate with the default cache"
            )
        seen = 0 if cache is None else cache.get_seq_length()
        first = seen == 0
        total = seen + length + (self._count if first else 0)
        if self._limit is not None and total > self._limit:
            raise MethodError(
                f"{self._count} virtual tokens and {total - self._count} of the text are more than the context of "
                f"{type(module).__name__}, {self._limit} tokens"
            )
        positions, tokens = given.get("position_ids"), total - self._count  # of the text, cached and new
        if mask is not None:
            _check_tokens("the attention mask", mask.shape[1], tokens)
            given["attention_mask"] = torch.cat([mask.new_ones(batch, self._count), mask], 1)
        elif positions is not None and not first and not torch.compiler.is_compiling():
            _check_tokens("position_ids", int(positions.max()) + 1, tokens)
        if positions is not None:
            given["position_ids"] = positions + self._count
        self._rows = self._place(given, batch) if first else 0
        if self._rows:
            self._extend_rows(given, batch, length)
        return (), given

    def _extend_rows(self, given: dict[str, Any], batch: int, length: int) -> None:
        """Arguments that hold one value a position get one for each virtual row."""
        rows = self._rows
        self._sequence = rows + length
        positions = given.get("position_ids")
        if positions is not None:
            own = torch.arange(rows, device=positions.device, dtype=positions.dtype)
            given["position_ids"] = torch.cat([own.expand(*positions.shape[:-1], rows), positions], -1)
        labels = given.get("labels")
        if labels is not None and labels.shape == (batch, length) and not labels.is_floating_point():
            given["labels"] = torch.cat([labels.new_full((batch, rows), IGNORED), labels], 1)
        kinds = given.get("token_type_ids")
        if kinds is not None:
            given["token_type_ids"] = torch.cat([kinds.new_zeros(batch, rows), kinds], 1)
        for name in ("start_positions", "end_positions"):
            if given.get(name) is not None:
                given[name] = given[name] + rows

    def _after(self, module: nn.Module, args: tuple, output):
        rows, self._rows = self._rows, 0
        if not rows or output is None or self._task == "SEQ_CLS":
            return None
        if isinstance(output, tuple):
            dims = (2, 3) if self._task == "QUESTION_ANS" else (3,)
            return tuple(self._text_part(value, rows, dims) for value in output)
        for name in _PER_POSITION:
            if output.get(name) is not None:
                output[name] = self._text_part(output[name], rows)
        return output

    def _text_part(self, value, rows: int, dims: tuple[int, ...] = (2, 3)):
        """`[batch, rows + text, ...]` without the rows; anything else as it is."""
        if isinstance(value, torch.Tensor) and value.ndim in dims and value.shape[1] == self._sequence:
            return value[:, rows:]
        return value

    # Files

    def folded(self) -> tuple[MethodConfig, dict[str, torch.Tensor]]:
        """The virtual tokens themselves; what computes them is for training only."""
        with torch.no_grad():
            values = {FOLDED: self.encode().flatten(1)}
        return self._folded_config(), values | self._head.parameters()

    def _folded_config(self) -> VirtualTokensConfig:
        return type(self.config)(
            num_virtual_tokens=self.config.num_virtual_tokens, train_head=bool(self._head.parameters())
        )

    def _peft_settings(self) -> dict[str, Any]:
        """Keys of PEFT's configuration that are this method's own."""
        return {}

    def to_peft(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        if self.peft_type is None:
            return None
        head = self._head.parameters()
        config = {
            "peft_type": self.peft_type,
            "task_type": self._task or "FEATURE_EXTRACTION",
            "base_model_name_or_path": getattr(self.model.config, "_name_or_path", None) or None,
            "revision": None,
            "inference_mode": True,
            "auto_mapping": None,
            "modules_to_save": sorted({name.split(".")[0] for name in head}) or None,
            "num_virtual_tokens": self.config.num_virtual_tokens,
            "num_transformer_submodules": 1,
            "num_layers": self._text_config.num_hidden_layers,
            "num_attention_heads": self._text_config.num_attention_heads,
            "token_dim": self._width,
        }
        values = self.folded()[1]
        named = {FOLDED: values[FOLDED]} | {f"{_PEFT_PREFIX}{name}": t for name, t in head.items()}
        return config | self._peft_settings(), named

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[MethodConfig, dict]:
        values = tensors.get(FOLDED)
        if values is None or values.ndim != 2:
            raise MethodError(f"the file of {cls.peft_type} holds no {FOLDED} of two dimensions")
        if config.get("num_transformer_submodules") not in (None, 1):
            raise MethodError("the file has virtual tokens for an encoder and a decoder, which is not supported")
        named = {name.removeprefix(_PEFT_PREFIX): t for name, t in tensors.items()}
        return cls.config_class(num_virtual_tokens=len(values), train_head=len(named) > 1), named


def _check_tokens(what: str, given: int, expected: int) -> None:
    """Raises where virtual tokens in a cache were taken for tokens of the text, as `generate` does."""
    if given != expected:
        raise MethodError(
            f"{what} counts {given} tokens of the text; there are {expected}, in the cache and new. To generate from "
            "an earlier cache, pass the tokens that are not in it yet, and an attention mask for the whole text"
        )


class Folded(nn.Module):
    """Virtual tokens that are trained as they are.

    Args:
        values: `[P, ...]`; kept in float32.
    """

    def __init__(self, values: torch.Tensor):
        super().__init__()
        self.prompt_embeddings = nn.Parameter(values.detach().float().clone())

    def forward(self) -> torch.Tensor:
        """`[P, ...]`"""
        return self.prompt_embeddings


class PromptMethod(VirtualTokensMethod):
    """Virtual tokens before the input embeddings; the encoder computes `[P, width]`.

    The model goes on getting `input_ids`, with P more at the front whose embeddings are exchanged behind the
    embedding layer, because classifiers look for the last token of the text in them.
    """

    peft_type: ClassVar[str | None]

    def _install(self) -> None:
        super()._install()
        self._pending: torch.Tensor | None = None
        self._handles.append(self._embeddings.register_forward_hook(self._exchange))

    def rows(self) -> torch.Tensor:
        """What stands before the text, `[length, width]`; default: the virtual tokens."""
        return self.encode()

    def _place(self, given: dict[str, Any], batch: int) -> int:
        prompt = self.rows()
        count = len(prompt)
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if ids is not None:
            padding = getattr(self._text_config, "pad_token_id", None)
            given["input_ids"] = torch.cat([ids.new_full((batch, count), 1 if padding == 0 else 0), ids], 1)
            self._pending = prompt
        else:
            prompt = prompt.to(embeds.device, embeds.dtype)
            given["inputs_embeds"] = torch.cat([prompt.expand(batch, -1, -1), embeds], 1)
        return count

    def _exchange(self, module: nn.Module, args: tuple, output: torch.Tensor):
        prompt, self._pending = self._pending, None
        if prompt is None:
            return None
        prompt = prompt.to(output.device, output.dtype).expand(len(output), -1, -1)
        return torch.cat([prompt, output[:, prompt.shape[1] :]], 1)

    def _after(self, module: nn.Module, args: tuple, output):
        missed, self._pending = self._pending is not None, None
        if missed and output is not None:
            raise MethodError(
                f"{type(module).__name__} did not use its input embeddings, so that {self.name} had no effect"
            )
        return super()._after(module, args, output)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pending": None}
