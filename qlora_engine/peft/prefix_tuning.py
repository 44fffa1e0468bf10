"""Prefix tuning (Li and Liang 2021, "Prefix-tuning: Optimizing continuous prompts for generation")."""

import dataclasses
import inspect
from typing import Any, ClassVar

import torch
from torch import nn

from qlora_engine.peft.base import MethodError, register
from qlora_engine.peft.prompt_tuning import repeated, token_ids, word_vectors
from qlora_engine.peft.virtual_tokens import CACHE_NAMES, Folded, VirtualTokensConfig, VirtualTokensMethod

INITS = ("random", "vocabulary", "text")
_LAYER_CACHE_NAMES = (*CACHE_NAMES, "layer_past")  # what attention layers call it


@dataclasses.dataclass
class PrefixTuning(VirtualTokensConfig):
    """Trains P keys and values in each layer, which each token of the text attends to; none has a query.

    `attention(Q, [P_K; K], [P_V; V])`, with `P_K` and `P_V` of `[P, heads, head_dim]` a layer; heads are those of
    keys and values, which grouped-query attention has few of. The text's positions begin at P.

    Attributes:
        num_virtual_tokens: P; with `init="text"`, 0 means as many as the text has tokens.
        train_head: see `VirtualTokensConfig`.
        reparametrise: trains an embedding and an MLP that compute the prefix, `W2 tanh(W1 e)`, which the paper found
            steadier. A file holds what they compute.
        encoder_hidden_size: width of that MLP inside; default: heads * head_dim.
        init: where the prefix begins.
            "random": normally distributed around 0, which disturbs a model at first.
            "text": at the keys and values that the model has for `init_text`, repeated or cut off to P tokens. The
            paper found real words best where data are few. For models that read from left to right.
            "vocabulary": the same of P tokens drawn at random.
        init_std: standard deviation of keys and values that begin at random, the MLP's as well.
        init_text: a text, best one that describes the task.
        tokenizer: that of the model, or the name or path of one. It is not saved.
    """

    name: ClassVar[str] = "prefix_tuning"
    reparametrise: bool = False
    encoder_hidden_size: int | None = None
    init: str = "random"
    init_std: float = 0.02
    init_text: str | None = None
    tokenizer: Any = None


class PrefixEncoder(nn.Module):
    """The MLP that computes a prefix in training.

    Args:
        count: P.
        width: heads * head_dim.
        layers: of the model.
        hidden: width inside.
        std: standard deviation, roughly, of what it computes before it is trained.
    """

    def __init__(self, count: int, width: int, layers: int, hidden: int, std: float):
        super().__init__()
        self.embedding = nn.Embedding(count, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 2 * layers * width))
        nn.init.normal_(self.mlp[2].weight, std=std / hidden**0.5)
        nn.init.zeros_(self.mlp[2].bias)

    def forward(self) -> torch.Tensor:
        """`[P, layers * 2 * heads * head_dim]`"""
        return self.mlp(self.embedding.weight)


@register
class PrefixTuningMethod(VirtualTokensMethod):
    """The prefix goes into the cache that a model is given, so that its layers and masks treat it as its past.

    Models take the cache away from their layers under gradient checkpointing: a hook at each attention layer gives it
    the prefix then, in the forward pass and again when the layer is computed anew.
    """

    config_class = PrefixTuning
    peft_type = "PREFIX_TUNING"

    def _check_model(self) -> None:
        config: PrefixTuning = self.config
        if config.init not in INITS:
            raise MethodError(f"init is {config.init!r}; expected one of {', '.join(INITS)}")
        if config.init == "text" and (config.reparametrise or not config.init_text):
            raise MethodError(
                'init="text" needs init_text, and reparametrise=False: an MLP cannot begin at given values'
            )
        if config.encoder_hidden_size is not None and config.encoder_hidden_size < 1:
            raise MethodError(f"encoder_hidden_size is {config.encoder_hidden_size}; expected at least 1")
        if config.init == "text" and config.num_virtual_tokens == 0:
            ids = token_ids(config.tokenizer, config.init_text)
            self.config = dataclasses.replace(config, num_virtual_tokens=len(ids))
        super()._check_model()

    def _install(self) -> None:
        self._caches: dict[bool, Any] = {}  # the last prefixes, with gradients and without
        self._active = self._graded = False
        super()._install()
        self._handles += [m.register_forward_pre_hook(self._supply, with_kwargs=True) for m in self._attention]

    def _find_attention(self) -> None:
        """Attention layers, what they call their arguments, and the shape of their keys."""
        kind, config = type(self.model).__name__, self._text_config
        found = [m for m in self.model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
        self._names: dict[type, tuple[list[str], str]] = {}
        self._attention = []
        for module in found:
            names = list(inspect.signature(module.forward).parameters)
            cache = next((name for name in _LAYER_CACHE_NAMES if name in names), None)
            if cache is None or not hasattr(module, "is_causal") or getattr(module, "is_cross_attention", False):
                continue
            self._names[type(module)] = names, cache
            self._attention.append(module)
        self._layers = config.num_hidden_layers
        self._attention.sort(key=lambda module: module.layer_idx)
        if [m.layer_idx for m in self._attention] != list(range(self._layers)):
            raise MethodError(
                f"{len(self._attention)} of the {self._layers} layers of {kind} are attention layers that read from "
                f"a cache; {self.name} needs all of them. Prompt tuning needs none"
            )
        self._causal = all(m.is_causal for m in self._attention)
        shapes = {_heads(layer) for layer in getattr(config, "per_layer_config", None) or [config]}
        if len(shapes) != 1 or getattr(config, "kv_lora_rank", None):
            raise MethodError(f"the layers of {kind} have keys and values of different shapes, or compressed ones")
        self._heads, self._head_dim = shapes.pop()

    def _make_encoder(self) -> nn.Module:
        config: PrefixTuning = self.config
        self._find_attention()
        width = self._heads * self._head_dim
        if config.reparametrise:
            hidden = config.encoder_hidden_size or width
            return PrefixEncoder(config.num_virtual_tokens, width, self._layers, hidden, config.init_std)
        if config.init == "random":
            return Folded(torch.randn(config.num_virtual_tokens, 2 * self._layers * width) * config.init_std)
        if not self._causal:
            raise MethodError(f'{type(self.model).__name__} keeps no keys and values of a text: use init="random"')
        from qlora_engine.peft.prefix_cache import states_of

        weight = self._embeddings.weight
        if config.init == "vocabulary":
            ids = torch.randint(len(weight), (config.num_virtual_tokens,), device=weight.device)
        else:
            words = token_ids(config.tokenizer, config.init_text)
            word_vectors(self._embeddings, words)  # raises where the vocabulary lacks one
            ids = repeated(torch.tensor(words, device=weight.device), config.num_virtual_tokens)
        states = states_of(self.model, ids)
        return Folded(states.permute(3, 0, 1, 2, 4).flatten(1))  # [P, layers, 2, heads, head_dim], flat

    def prefix(self) -> torch.Tensor:
        """`[layers, 2, heads, P, head_dim]`, keys and values."""
        shape = (self._layers, 2, self._heads, self._head_dim)
        return self.encode().unflatten(1, shape).permute(1, 2, 3, 0, 4)

    def _place(self, given: dict[str, Any], batch: int) -> int:
        from qlora_engine.peft.prefix_cache import PrefixCache, empty_cache, fill

        text = given.get("input_ids")
        text = given["inputs_embeds"] if text is None else text
        prefix = self.prefix()
        alone = PrefixCache(prefix)
        self._caches[torch.is_grad_enabled()] = alone
        if given.get("attention_mask") is None:
            given["attention_mask"] = torch.ones(
                batch, self._count + text.shape[1], dtype=torch.long, device=text.device
            )
        cache, keep = given.get(self._cache), given.get("use_cache")
        keep = getattr(self._text_config, "use_cache", False) if keep is None else keep
        recomputed = self.model.training and getattr(self.model, "is_gradient_checkpointing", False)
        if not self._causal or recomputed or not (keep or cache is not None):
            given[self._cache] = alone
            return 0
        given[self._cache] = empty_cache(self.model.config) if cache is None else cache
        devices = [next(module.parameters()).device for module in self._attention]
        fill(given[self._cache], prefix, batch, self._embeddings.weight.dtype, devices)
        return 0

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        found = super()._before(module, args, kwargs)
        self._active, self._graded = found is not None, torch.is_grad_enabled()
        return found

    def _supply(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        """Gives an attention layer the prefix where the model has taken the cache away."""
        if not self._active and not _in_backward():  # there, a checkpoint is computed anew
            return None
        names, cache = self._names[type(module)]
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get(cache) is not None:
            return None
        if self._active and torch.is_grad_enabled() != self._graded:
            raise MethodError(
                f"gradient checkpointing that is reentrant would leave {self.name} without gradients; enable it with "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        given[cache] = self._caches[torch.is_grad_enabled()]
        return (), given

    def _after(self, module: nn.Module, args: tuple, output):
        """The prefix alone is no cache to go on from: it is taken out of the output."""
        from qlora_engine.peft.prefix_cache import PrefixCache

        self._active = False
        if isinstance(output, tuple):
            return tuple(value for value in output if not isinstance(value, PrefixCache))
        if output is None or not any(isinstance(value, PrefixCache) for value in output.values()):
            return None
        return type(output)(**{k: v for k, v in output.items() if not isinstance(v, PrefixCache)})

    def _peft_settings(self) -> dict[str, Any]:
        width = self._heads * self._head_dim
        return {
            "token_dim": width,
            "num_attention_heads": self._heads,
            "prefix_projection": False,  # it is folded
            "encoder_hidden_size": self.config.encoder_hidden_size or width,
            "init_weights": None,
        }

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_caches": {}, "_active": False}


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _heads(config) -> tuple[int, int]:
    """How many heads of keys and values a layer has, and how wide they are."""
    queries = config.num_attention_heads
    return (
        getattr(config, "num_key_value_heads", None) or queries,
        getattr(config, "head_dim", None) or config.hidden_size // queries,
    )
