"""The fine-tuning recipe: options, data, training and report.

`finetune` needs the extra `[train]`; importing this package does not.
"""

from qlora_engine.training.errors import Interrupted, UsageError
from qlora_engine.training.options import FinetuneOptions

__all__ = ["FinetuneOptions", "Interrupted", "UsageError"]
