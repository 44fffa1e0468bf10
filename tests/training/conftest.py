import pytest

from tests.training.tiny_llm import pairs, save_model, write_jsonl


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs(80))
