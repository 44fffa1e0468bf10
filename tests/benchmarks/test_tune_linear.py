"""The table of products: what the committed measurements say, and that every way is worth a try somewhere."""

import json

import pytest


def test_the_table_is_what_was_measured(load):
    tune = load("tune_linear")
    found = json.loads(tune.MEASURED.read_text())
    assert tune.table(found["rows"], found["environment"]) == tune.TABLE.read_text()


def test_the_fastest_way_is_taken(load):
    tune = load("tune_linear")
    us = {"few": 9.0, "levels:16,1,3": 7.5, "fused:sm80": 8.0}
    row = {"gradient": False, "adapter": True, "M": 16, "N": 300, "K": 256, "us": us}
    assert tune.entry(row) == "    {true, 16, 300, 256, 4, {16, 1, 3}},  // levels:16,1,3: 7.5 us"
    us["fused:sm80"] = 1.0
    assert tune.entry(row) == "    {true, 16, 300, 256, 3, {0, 0, 0}},  // fused:sm80: 1.0 us"
    row |= {"gradient": True, "us": {"levels:16,1,3": 7.5, "many:2,1,8": 7.0}}
    assert tune.entry(row) == "    {true, 16, 300, 256, 1, {2, 1, 8}},  // many:2,1,8: 7.0 us"


@pytest.mark.parametrize(
    ("M", "kinds"),
    [
        (1, {"few", "levels"}),
        (64, {"levels", "fused", "fused:sm80"}),
        (512, {"levels", "fused", "dequantize"}),
        (2048, {"fused", "dequantize"}),
    ],
)
def test_candidates(load, M, kinds):
    tune = load("tune_linear")
    for N, K in tune.WEIGHTS:
        found = tune.candidates(M, N, K, 132)
        assert len(set(found)) == len(found)
        assert {way if way == "fused:sm80" else way.partition(":")[0] for way in found} == kinds
        splits = [int(way.rpartition(",")[2]) for way in found if way.startswith("levels")]
        assert all(s <= max(1, K // 256) for s in splits)


@pytest.mark.parametrize(
    ("M", "kinds"),
    [
        (1, {"few", "levels"}),
        (64, {"few", "levels", "many"}),
        (512, {"levels", "many", "dequantize"}),
        (2048, {"many", "dequantize"}),
    ],
)
def test_candidates_of_the_gradient(load, M, kinds):
    tune = load("tune_linear")
    for N, K in tune.WEIGHTS:
        found = tune.gradient_candidates(M, N, K, 132)
        assert len(set(found)) == len(found)
        assert {way.partition(":")[0] for way in found} == kinds
