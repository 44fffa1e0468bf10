"""Who takes part in bench_methods.py, with which settings and at which learning rate."""

import dataclasses
from collections.abc import Callable

from qlora_engine import peft

RANK, ALPHA = 8, 16
VIRTUAL_TOKENS = 20


@dataclasses.dataclass(frozen=True)
class Contender:
    """A row of the table.

    Attributes:
        name: of the row; the method's own name, where it is on the NF4 model.
        base: "nf4", "16-bit", or "float32" (for full fine-tuning, which computes in 16 bits all the same).
        config: makes the method's settings from the number of steps and the seed; None: no method.
        learning_rate: at the peak; 0: nothing is trained.
        source: where the learning rate comes from.
    """

    name: str
    base: str
    config: Callable[[int, int], peft.MethodConfig] | None
    learning_rate: float
    source: str = ""


def _of(config: peft.MethodConfig) -> Callable[[int, int], peft.MethodConfig]:
    return lambda steps, seed: dataclasses.replace(config)


def _adalora(steps: int, seed: int) -> peft.AdaLoRA:
    return peft.AdaLoRA(
        init_r=12, target_r=RANK, alpha=24, total_steps=steps, t_init=steps // 5, t_final=2 * steps // 5
    )


def _diff_pruning(steps: int, seed: int) -> peft.DiffPruning:
    return peft.DiffPruning(share=0.005, fix_at=max(1, 2 * steps // 3), seed=seed)


_LORA = {"r": RANK, "alpha": ALPHA}
_PEFT = "PEFT's documentation"

CONTENDERS = (
    Contender("frozen, 16-bit", "16-bit", None, 0.0),
    Contender("frozen, nf4", "nf4", None, 0.0),
    Contender("lora", "nf4", _of(peft.LoRA(**_LORA)), 1e-3, f"{_PEFT}, guide to LoRA"),
    Contender("lora_plus", "nf4", _of(peft.LoRAPlus(**_LORA)), 2e-4, "Hayou et al. 2024: A's, B's is 16 times that"),
    Contender("lora_fa", "nf4", _of(peft.LoRAFA(**_LORA)), 1e-3, "that of LoRA"),
    Contender("dora", "nf4", _of(peft.DoRA(**_LORA)), 1e-3, "that of LoRA"),
    Contender("adalora", "nf4", _adalora, 2e-3, "Zhang et al. 2023, appendix: 5e-4 to 2.2e-3"),
    Contender(
        "vera", "nf4", lambda steps, seed: peft.VeRA(r=256, seed=seed), 1e-2, "Kopiczko et al. 2024: 3e-3 to 2e-2"
    ),
    Contender("ia3", "nf4", _of(peft.IA3()), 8e-3, f"{_PEFT}, guide to IA3"),
    Contender("bottleneck", "nf4", _of(peft.Bottleneck(size=16)), 1e-3, "Houlsby et al. 2019: 3e-4 to 3e-3"),
    Contender(
        "prompt_tuning", "nf4", _of(peft.PromptTuning(num_virtual_tokens=VIRTUAL_TOKENS)), 3e-2, f"{_PEFT}, prompts"
    ),
    Contender("p_tuning", "nf4", _of(peft.PTuning(num_virtual_tokens=VIRTUAL_TOKENS)), 1e-3, f"{_PEFT}, P-tuning"),
    Contender(
        "prefix_tuning", "nf4", _of(peft.PrefixTuning(num_virtual_tokens=VIRTUAL_TOKENS)), 1e-2, f"{_PEFT}, prefixes"
    ),
    Contender(
        "p_tuning_v2", "nf4", _of(peft.PTuningV2(num_virtual_tokens=VIRTUAL_TOKENS)), 5e-3, "Liu et al. 2022: 5e-3"
    ),
    Contender("bitfit", "nf4", _of(peft.BitFit(add_missing=True)), 1e-3, "Ben Zaken et al. 2022: 1e-4 to 1e-3"),
    Contender("selection", "nf4", _of(peft.LayerSelection(norms=True)), 1e-3, "that of BitFit"),
    Contender("fishmask", "nf4", _of(peft.FishMask(share=0.005)), 1e-3, "that of LoRA"),
    Contender("diff_pruning", "nf4", _diff_pruning, 1e-3, "that of LoRA"),
    Contender("lora, 16-bit", "16-bit", _of(peft.LoRA(**_LORA)), 1e-3, f"{_PEFT}, guide to LoRA"),
    Contender("full fine-tuning", "float32", None, 5e-5, "transformers' Trainer: its default"),
)
