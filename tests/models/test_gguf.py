import json

import numpy as np
import pytest
import torch

from qlora_engine.models.gguf import cached_conversion, convert_gguf, find_gguf
from tests.training.tiny_llm import save_model

HEADS, KV_HEADS = 4, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(folder, path):
    """The model of a Hugging Face folder in the format of llama.cpp, unquantized."""
    from gguf import GGUFWriter
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
    config = model.config
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in sorted(tokenizer["vocab"].items(), key=lambda item: item[1])])
    writer.add_token_types([3] * 3 + [1] * (config.vocab_size - 3))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy().astype(np.float32)
        parts = name.split(".")
        if name == "model.embed_tokens.weight":
            target = "token_embd.weight"
        elif name == "model.norm.weight":
            target = "output_norm.weight"
        elif name == "lm_head.weight":  # tied
            continue
        else:
            key = ".".join(parts[3:-1])
            target = f"blk.{parts[2]}.{NAMES[key]}.weight"
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(key)
            if heads:  # llama.cpp rotates pairs of neighbours, transformers rotates halves
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(target, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("gguf") / "tiny")


@pytest.fixture(scope="module")
def gguf_file(folder):
    return write_gguf(folder, folder.parent / "tiny.gguf")


def test_converted_model_is_the_original(folder, gguf_file, tmp_path):
    """Same logits, and the folder loads as one that was never quantized."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = convert_gguf(gguf_file, tmp_path / "out", "float32")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    original, converted = (AutoModelForCausalLM.from_pretrained(place).eval() for place in (folder, out))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)
    text = "the tree is red"
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == AutoTokenizer.from_pretrained(folder)(text).input_ids


def test_cache_converts_once_and_follows_the_file(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_ENGINE_CACHE", str(tmp_path))
    first = cached_conversion(gguf_file)
    assert first.parent == tmp_path
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert cached_conversion(gguf_file.parent) == first  # a folder means the file in it
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    changed = tmp_path / "tiny.gguf"
    changed.write_bytes(gguf_file.read_bytes())
    assert cached_conversion(changed) != first


def test_find_gguf(tmp_path):
    assert find_gguf(tmp_path) is None
    assert find_gguf(tmp_path / "none") is None
    (tmp_path / "a.gguf").touch()
    assert find_gguf(tmp_path) == tmp_path / "a.gguf" == find_gguf(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf\); name one"):
        find_gguf(tmp_path)


def test_what_is_not_gguf_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no GGUF file"):
        convert_gguf(tmp_path, tmp_path / "out")
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="does not begin with the letters GGUF"):
        convert_gguf(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
