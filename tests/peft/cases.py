"""Settings of every method with which the protocol's tests run, and the models they run on."""

import dataclasses

import torch
from torch import nn

import qlora_engine as qe
from qlora_engine.peft import IA3, BitFit, Bottleneck, DiffPruning, FishMask, LayerSelection, MethodConfig
from tests.models.tiny import bert, gpt2, llama

MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}


@dataclasses.dataclass(frozen=True)
class Case:
    """A method as the tests use it.

    Attributes:
        config: makes its settings.
        models: names of the models that can carry it.
        learning_rate: at which a few steps lower the loss.
        changes_at_once: whether the untrained method already changes the model's output.
    """

    config: MethodConfig
    models: tuple[str, ...] = ("llama", "gpt2", "bert")
    learning_rate: float = 1e-2
    changes_at_once: bool = False


CASES = {
    "bitfit": Case(BitFit(add_missing=True)),
    "bitfit, own biases": Case(BitFit(), models=("gpt2", "bert")),
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
