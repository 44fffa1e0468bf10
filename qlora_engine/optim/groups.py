"""Parameter groups."""

import torch


def lora_plus_groups(model: torch.nn.Module, lr: float, ratio: float = 16.0, **options) -> list[dict]:
    """Groups in which the B factors of adapters learn faster than everything else.

    Hayou et al. 2024, "LoRA+: Efficient low rank adaptation of large models": B starts at zero and wants a larger
    learning rate than A; the paper finds ratios of about 16.

    Args:
        model: whose parameters that require gradients are grouped; B factors are those with "lora_B" or
            "lora_embedding_B" in their name.
        lr: learning rate of everything else.
        ratio: what it is multiplied by for B factors.
        **options: more entries of both groups, such as weight_decay.

    Returns:
        Two groups for an optimizer, or one where the model has no B factors.

    Raises:
        ValueError: for a ratio that is not positive, or a model without parameters to train.
    """
    if not ratio > 0:
        raise ValueError(f"ratio is {ratio}; expected a positive number")
    factors, others = [], []
    for name, param in model.named_parameters():
        if param.requires_grad:
            is_factor = any(part in name for part in ("lora_B", "lora_embedding_B"))
            (factors if is_factor else others).append(param)
    groups = [{"params": others, "lr": lr, **options}, {"params": factors, "lr": lr * ratio, **options}]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient; add adapters to it first")
    return groups
