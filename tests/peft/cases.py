"""Settings of every method with which the protocol's tests run, and the models they run on."""

import dataclasses

import torch
from torch import nn

import qlora_engine as qe
from qlora_engine.peft import (
    IA3,
    AdaLoRA,
    BitFit,
    Bottleneck,
    DiffPruning,
    DoRA,
    FishMask,
    LayerSelection,
    LoRA,
    LoRAFA,
    LoRAPlus,
    MethodConfig,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    VeRA,
)
from tests.models.tiny import bert, gpt2, llama

MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}


@dataclasses.dataclass(frozen=True)
class Case:
    """A method as the tests use it.

    Attributes:
        config: makes its settings.
        models: names of the models that can carry it.
        learning_rate: at which a few steps lower the loss.
        changes_at_once: whether the untrained method already changes the model's output; None: by rounding
            alone, on some layers.
    """

    config: MethodConfig
    models: tuple[str, ...] = ("llama", "gpt2", "bert")
    learning_rate: float = 1e-2
    changes_at_once: bool | None = False


CASES = {
    "bitfit": Case(BitFit(add_missing=True)),
    "bitfit, own biases": Case(BitFit(), models=("gpt2", "bert")),
    "prompt tuning": Case(PromptTuning(num_virtual_tokens=5), changes_at_once=True),
    "prompt tuning, vocabulary": Case(PromptTuning(num_virtual_tokens=3, init="vocabulary"), changes_at_once=True),
    "p-tuning, lstm": Case(PTuning(num_virtual_tokens=5, encoder_hidden_size=24), changes_at_once=True),
    "p-tuning, mlp": Case(PTuning(num_virtual_tokens=3, encoder="mlp"), changes_at_once=True),
    "p-tuning, anchors": Case(PTuning(template=[2, [7, 9], 3], encoder="mlp"), changes_at_once=True),
    "prefix tuning": Case(PrefixTuning(num_virtual_tokens=5), changes_at_once=True),
    "prefix tuning, vocabulary": Case(
        PrefixTuning(num_virtual_tokens=4, init="vocabulary"), models=("llama", "gpt2"), changes_at_once=True
    ),
    "prefix tuning, mlp": Case(PrefixTuning(num_virtual_tokens=3, reparametrise=True), changes_at_once=True),
    "p-tuning v2": Case(PTuningV2(num_virtual_tokens=5), changes_at_once=True),
    "p-tuning v2, mlp": Case(
        PTuningV2(num_virtual_tokens=3, reparametrise=True, encoder_hidden_size=24), changes_at_once=True
    ),
    "lora": Case(LoRA(r=4, alpha=8)),
    "lora, gaussian, biases": Case(LoRA(r=3, rslora=True, init="gaussian", bias="all"), models=("gpt2", "bert")),
    "lora, orthogonal": Case(LoRA(r=5, init="orthogonal"), changes_at_once=True),
    "lora, pissa": Case(LoRA(r=4, alpha=4, init="pissa"), changes_at_once=None),
    "lora, embeddings": Case(LoRA(r=4, target_modules=["re:.*(embed_tokens|wte|word_embeddings)"])),
    "lora_plus": Case(LoRAPlus(r=4, alpha=8, ratio=4.0)),
    "lora_fa": Case(LoRAFA(r=4, alpha=8)),
    "vera": Case(VeRA(r=16), learning_rate=3e-2),
    "vera, from a seed": Case(VeRA(r=8, d_initial=0.5, seed=3, save_projection=False), learning_rate=3e-2),
    "adalora": Case(AdaLoRA(init_r=6, target_r=3, total_steps=20)),
    "dora": Case(DoRA(r=4, alpha=8)),
    "dora, gaussian": Case(DoRA(r=3, init="gaussian", bias="lora_only")),
    "bottleneck": Case(Bottleneck(size=6)),
    "bottleneck, parallel": Case(Bottleneck(size=6, parallel=True, activation="relu", scaling=4.0)),
    "bottleneck, pfeiffer": Case(Bottleneck(size=6, placement="pfeiffer")),
    "diff pruning": Case(DiffPruning()),
    "diff pruning, matrices": Case(DiffPruning(structured="matrix")),
    "ia3": Case(IA3(), learning_rate=3e-2),
    "selection, last block": Case(LayerSelection(last=1, skip_quantized=True)),
    "selection, norms": Case(LayerSelection(norms=True)),
    "selection, ends": Case(LayerSelection(head=True, embeddings=True)),
}


def build(name: str, packed: bool) -> nn.Module:
    """A tiny model in float32, or with its linear layers in 4 bits; the same numbers every time."""
    torch.manual_seed(0)
    model = MODELS[name]()
    if packed:
        qe.prepare(model, qe.QLoRAConfig(r=0))
    return model.eval()


def inputs(name: str, length: int = 12) -> dict[str, torch.Tensor]:
    """A batch for a model, with labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (3, length), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["labels"] = torch.tensor([0, 1, 0]) if name == "bert" else ids.clone()
    return batch


def logits(model: nn.Module, name: str) -> torch.Tensor:
    """The model's output for the batch, without gradients."""
    batch = inputs(name)
    labels = batch.pop("labels")
    with torch.no_grad():
        found = model(**batch).logits
    return found if name == "bert" else found[:, -labels.shape[1] :]


# methods that look at data before they train
CASES["fishmask"] = Case(FishMask(0.05, samples=[inputs("llama")]), models=("llama", "gpt2"))
CASES["fishmask, classification"] = Case(FishMask(0.05, samples=[inputs("bert")]), models=("bert",))
