"""Optimizers: PagedAdamW, and parameter groups for it."""

from qlora_engine.optim.groups import lora_plus_groups
from qlora_engine.optim.paged_adamw import PagedAdamW

__all__ = ["PagedAdamW", "lora_plus_groups"]
