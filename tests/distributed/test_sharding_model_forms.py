"""Sharded models of other forms than the plain one: embeddings and head in 4 bits, compiled layers, by accelerate."""

import pytest
import torch

import qlora_engine as qe
from qlora_engine.nn import NF4Embedding, TiedNF4Linear
from tests.distributed.launch import run_ranks

pytest.importorskip("transformers")

from tests.distributed.test_sharding import optimizer_of, train
from tests.models.tiny import llama

FORMS = ("packed", "packed and tied, with compiled layers")
if torch.__version__ >= "2.13":  # before, torch makes no parameters of bytes, but in `qe.distributed.shard`
    FORMS += ("by accelerate",)


def by_accelerate(model, optimizer):
    """What `Accelerator.prepare` makes of both with its FSDP2 plugin, which it leaves out on CPUs unless told."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model, optimizer = accelerator.prepare(model, optimizer)
    assert {(type(p).__name__, p.dtype) for n, p in model.named_parameters() if n.endswith("proj.weight")} == {
        ("DTensor", torch.uint8)
    }
    return model, optimizer


def run(form: str, sharded: bool) -> list[float]:
    """Losses of two steps of a model of one layer."""
    tied, packed = "tied" in form, "packed" in form
    config = qe.QLoRAConfig(r=4, quantize_embeddings=packed, quantize_head=packed)
    model = qe.prepare(llama(num_hidden_layers=1, tie_word_embeddings=tied), config).train()
    table = model.model.embed_tokens
    assert (isinstance(table, NF4Embedding), isinstance(model.lm_head, TiedNF4Linear)) == (packed, tied)
    if sharded and form == "by accelerate":
        return train(*by_accelerate(model, optimizer_of(model)), 0, 2)
    if sharded:
        qe.distributed.shard(model)
        if packed:
            assert {(type(t).__name__, t.dtype) for t in (table.weight, table.absmax)} == {("DTensor", torch.uint8)}
        if "layers" in form:  # whose forward and backward are a graph each
            for layer in model.model.layers:
                layer.compile(backend="aot_eager")
    return train(model, optimizer_of(model), 0, 2)


def runs(sharded: bool) -> tuple[list[list[float]], int]:
    """Losses of all forms, and how many graphs torch made."""
    from torch._dynamo.utils import counters

    return [run(form, sharded) for form in FORMS], counters["stats"]["unique_graphs"]


def test_they_train_as_in_one_process():
    single, _ = runs(False)
    for found, graphs in run_ranks(runs, 2, True):
        assert graphs >= 2
        for form, losses, expected in zip(FORMS, found, single, strict=True):
            assert losses == pytest.approx(expected, rel=1e-5), form
