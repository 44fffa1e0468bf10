import pytest
import torch
import transformers
from torch import nn

from qlora_engine import peft
from qlora_engine.models.targets import linear_modules
from qlora_engine.peft import IA3, Bottleneck
from qlora_engine.peft.blocks import find_blocks, linear_targets
from tests.models.tiny import gpt_neox, t5
from tests.peft.cases import build

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "pad_token_id": 0,
}
SIZES_OF_BART = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "vocab_size": 128,
}


def of(kind: str, **sizes):
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**sizes)).eval()


FOUND = {
    "neox": (gpt_neox, "query_key_value", "attention.query_key_value attention.dense", "dense_h_to_4h dense_4h_to_h"),
    "phi3": (lambda: of("Phi3ForCausalLM", **SIZES), "qkv_proj", "qkv_proj o_proj", "gate_up_proj down_proj"),
    "qwen3": (
        lambda: of("Qwen3ForCausalLM", **SIZES, num_key_value_heads=2, head_dim=16),
        "k_proj v_proj",
        "q_proj o_proj",
        "gate_proj down_proj",
    ),
    "opt": (
        lambda: of(
            "OPTForCausalLM",
            **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
            ffn_dim=96,
            word_embed_proj_dim=64,
        ),
        "k_proj v_proj",
        "q_proj out_proj",
        "fc1 fc2",
    ),
    "distilbert": (
        lambda: of("DistilBertModel", dim=64, hidden_dim=96, n_layers=2, n_heads=4, vocab_size=128),
        "k_lin v_lin",
        "q_lin out_lin",
        "lin1 lin2",
    ),
    "vit": (
        lambda: of(
            "ViTModel",
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
        "k_proj v_proj",
        "q_proj o_proj",
        "fc1 fc2",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_architectures(name):
    make, keys_values, attention, feedforward = FOUND[name]
    blocks = find_blocks(make())
    assert len(blocks) == 2
    for block in blocks:

        def same(found, ends, root=block.path):
            assert all(path.startswith(f"{root}.") for path in found)
            assert len(found) == len(ends.split())
            assert all(path.endswith(f".{end}") for path, end in zip(found, ends.split(), strict=True))

        same(block.keys_values, keys_values)
        same([path for pair in block.attention for path in pair], attention)
        same([path for pair in block.feedforward for path in pair], feedforward)


@pytest.mark.parametrize(
    "make", [t5, lambda: of("BartForConditionalGeneration", **SIZES_OF_BART)], ids=["t5", "bart"]
)
def test_a_decoder_has_two_attentions_that_start_at_their_queries(make):
    blocks = find_blocks(make())
    assert len({block.stack for block in blocks}) == 2
    pairs = [len(block.attention) for block in blocks]
    assert pairs == [1, 1, 2, 2]
    for start, end in blocks[-1].attention:
        assert start.rsplit(".", 1)[0] == end.rsplit(".", 1)[0]
        assert start.rsplit(".", 1)[1] in ("q", "q_proj")


@pytest.mark.parametrize(
    "config", [IA3(), Bottleneck(size=4), Bottleneck(size=4, parallel=True)], ids=["ia3", "sequential", "parallel"]
)
@pytest.mark.parametrize(
    "make", [t5, lambda: of("BartForConditionalGeneration", **SIZES_OF_BART)], ids=["t5", "bart"]
)
def test_encoder_and_decoder_learn(make, config):
    net = make().train()
    method = peft.apply(net, config)
    ids = torch.randint(3, 100, (2, 7))
    optimizer = torch.optim.AdamW(method.trainable_parameters().values(), lr=1e-2)
    losses = []
    for _ in range(6):
        torch.manual_seed(0)  # the same dropout
        loss = net(input_ids=ids, labels=ids[:, :5].contiguous()).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1e-3
    assert all(p.grad is not None for p in method.trainable_parameters().values())


def test_targets():
    net = build("llama", False)
    every = linear_modules(net)
    assert linear_targets(net, ()) == [path for path in every if path != "lm_head"]
    assert linear_targets(build("llama", True), ()) == linear_targets(net, ())
    assert linear_targets(net, "lm_head") == ["lm_head"]
    with pytest.raises(ValueError, match=r"'q' matches no module.*q_proj"):
        linear_targets(net, ["q"])
    with pytest.raises(peft.MethodError, match="no linear layer beside"):
        linear_targets(nn.Sequential(nn.Tanh()), ())
    with pytest.raises(peft.MethodError, match="no list of blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))
