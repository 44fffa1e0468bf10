import pytest

from tests.training.tiny_llm import save_model


@pytest.fixture(scope="session")
def tiny_chat_model(tmp_path_factory):
    """Folder of a tiny Llama with a tokenizer and a chat template."""
    return save_model(tmp_path_factory.mktemp("model") / "tiny")
