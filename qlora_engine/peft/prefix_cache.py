"""A trained prefix as transformers' caches: what a model's layers read their past keys and values from."""

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from qlora_engine.peft.base import MethodError
from qlora_engine.peft.virtual_tokens import cache_name


class PrefixLayer(CacheLayerMixin):
    """One layer's prefix, which comes before whatever keys and values are given, and keeps none of them.

    As it never changes, a layer can be run again on it, which gradient checkpointing does.

    Args:
        keys: `[heads, P, head_dim]`
        values: `[heads, P, head_dim]`
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do: the prefix is there from the beginning."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """`[batch, heads, tokens, head_dim]` -> `[batch, heads, P + tokens, head_dim]`, both."""
        return _behind(self.keys, key_states), _behind(self.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys there are with `query_length` tokens, and the first one's place."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """P"""
        return self.keys.shape[-2]

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def _behind(prefix: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    heads, _, width = prefix.shape
    if states.shape[1] != heads or states.shape[3] != width:
        raise MethodError(
            f"this layer's keys and values are {states.shape[1]} heads of {states.shape[3]}, the prefix is for "
            f"{heads} heads of {width}: the model's layers are not what its configuration says"
        )
    return torch.cat([prefix.to(states.device, states.dtype).expand(len(states), -1, -1, -1), states], -2)


class PrefixCache(Cache):
    """The prefix alone, for a forward pass after which no cache is kept.

    Args:
        prefix: `[layers, 2, heads, P, head_dim]`, keys and values.
    """

    def __init__(self, prefix: torch.Tensor):
        super().__init__(layers=[PrefixLayer(keys, values) for keys, values in prefix])


def fill(cache: Cache, prefix: torch.Tensor, batch: int, dtype: torch.dtype, devices: list[torch.device]) -> None:
    """Puts a prefix at the beginning of an empty cache.

    Args:
        cache: grows with the text, such as `DynamicCache`.
        prefix: `[layers, 2, heads, P, head_dim]`
        batch: texts.
        dtype: that of the model's keys and values.
        devices: each layer's.
    """
    for index, (states, device) in enumerate(zip(prefix.to(dtype), devices, strict=True)):
        keys, values = states.to(device)[:, None].expand(-1, batch, -1, -1, -1)
        cache.update(keys, values, index)


def empty_cache(config) -> DynamicCache:
    """The cache that a model of this configuration makes for itself."""
    return DynamicCache(config=config)


@torch.no_grad()
def states_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Keys and values of a text in each layer, `[layers, 2, heads, tokens, head_dim]`.

    Args:
        model: reads from left to right, and keeps a cache.
        ids: int64 `[tokens]`
    """
    cache = empty_cache(model.config)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        model(input_ids=ids[None], use_cache=True, **{cache_name(model.forward): cache})
    finally:
        for module, flag in training.items():
            module.training = flag
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
