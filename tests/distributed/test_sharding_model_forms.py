"""Sharded models of other forms than the plain one: embeddings and head in 4 bits, compiled layers."""

import pytest
import torch

import qlora_engine as qe
from qlora_engine.nn import NF4Embedding, TiedNF4Linear
from tests.distributed.launch import run_ranks

pytest.importorskip("transformers")

from tests.distributed.test_sharding import optimizer_of, train
from tests.models.tiny import llama

FORMS = ("packed", "packed and tied, with compiled layers")


def run(form: str, sharded: bool) -> list[float]:
    """Losses of two steps of a model of one layer."""
    tied, packed = "tied" in form, "packed" in form
    config = qe.QLoRAConfig(r=4, quantize_embeddings=packed, quantize_head=packed)
    model = qe.prepare(llama(num_hidden_layers=1, tie_word_embeddings=tied), config).train()
    table = model.model.embed_tokens
    assert (isinstance(table, NF4Embedding), isinstance(model.lm_head, TiedNF4Linear)) == (packed, tied)
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
