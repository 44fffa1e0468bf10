import pytest
import torch

from qlora_engine import peft
from qlora_engine.peft import PTuning
from tests.peft.cases import build, inputs, logits
from tests.peft.virtual import Words, check_peft_reads, check_reads_peft, disturb

theirs = pytest.importorskip("peft")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoder", ["lstm", "mlp", "none"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_peft_reads_its_files(name, encoder, packed, tmp_path):
    check_peft_reads(PTuning(num_virtual_tokens=5, encoder=encoder, encoder_hidden_size=8), name, packed, tmp_path)


@pytest.mark.parametrize("encoder", ["LSTM", "MLP"])
@pytest.mark.parametrize(("name", "task"), [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
def test_reads_files_of_peft(name, task, encoder, tmp_path):
    config = theirs.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=4, encoder_reparameterization_type=encoder, encoder_hidden_size=16
    )
    method = check_reads_peft(config, name, tmp_path)
    assert method.config == PTuning(num_virtual_tokens=4, encoder="none", train_head=name == "bert")


@pytest.mark.parametrize("encoder", ["LSTM", "MLP"])
def test_the_encoder_is_that_of_peft(encoder):
    """The same weights compute the same virtual tokens."""
    net = build("llama", False)
    config = PTuning(num_virtual_tokens=6, encoder=encoder.lower(), encoder_hidden_size=10)
    method = peft.apply(net, config)
    other = theirs.PromptEncoder(
        theirs.PromptEncoderConfig(
            num_virtual_tokens=6,
            num_transformer_submodules=1,
            token_dim=64,
            encoder_reparameterization_type=encoder,
            encoder_hidden_size=10,
        )
    )
    names = {
        name.replace("lstm.", "lstm_head.").replace("mlp.", "mlp_head."): t for name, t in method.tensors().items()
    }
    other.load_state_dict(names)
    torch.testing.assert_close(method.encode(), other(torch.arange(6)[None])[0])


def test_anchors_stand_where_the_template_says():
    net = build("llama", False)
    method = peft.apply(net, PTuning(template=[3, "It was", 2], tokenizer=Words()))
    assert method.config.num_virtual_tokens == 5
    disturb(method.trainable_parameters().values())
    table = net.get_input_embeddings().weight
    virtual = method.encode().detach()
    prompt = torch.cat([virtual[:3], table[[5, 6]], virtual[3:]])
    ids = inputs("llama")["input_ids"]
    found = logits(net, "llama")
    method.remove()
    longer = torch.cat([prompt.expand(3, -1, -1), net.get_input_embeddings()(ids)], 1)
    torch.testing.assert_close(found, net(inputs_embeds=longer).logits[:, 7:], rtol=1e-5, atol=1e-5)


def test_a_file_with_anchors_needs_no_tokenizer_and_no_encoder(tmp_path):
    net = build("llama", False)
    method = peft.apply(net, PTuning(template=["ab", 3, "It was", 2], tokenizer=Words()))
    disturb(method.trainable_parameters().values())
    method.save(tmp_path)
    loaded = peft.load(build("llama", False), tmp_path)
    assert loaded.config == PTuning(
        num_virtual_tokens=5, encoder="none", template=[[5], 3, [5, 6], 2], train_head=False
    )
    assert list(loaded.tensors()) == ["prompt_embeddings"]
    assert loaded.report().saved_bytes == method.report().saved_bytes == 5 * 64 * 4
    torch.testing.assert_close(logits(loaded.model, "llama"), logits(net, "llama"))


def test_training_goes_on_from_a_state():
    """`state_dict` keeps the encoder, which a file does not."""
    net, twin = build("llama", False), build("llama", False)
    config = PTuning(num_virtual_tokens=4)
    method, other = peft.apply(net, config), peft.apply(twin, config)
    disturb(method.trainable_parameters().values())
    other.load_state_dict(method.state_dict())
    assert torch.equal(logits(net, "llama"), logits(twin, "llama"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "gru"}, "expected one of lstm, mlp, none"),
        ({"template": [3, "words"]}, "needs a tokenizer"),
        ({"template": [[3, 4]]}, "at least 1"),
        ({"template": [0, [3]]}, "asks for 0 virtual tokens"),
        ({"template": [2, [900]]}, "token 900 is not in the model's vocabulary"),
        ({"template": [30, [5] * 5000]}, "leave no room"),
        ({"encoder_num_layers": 0}, "encoder_num_layers is 0"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    net = build("llama", False)
    with pytest.raises(peft.MethodError, match=message):
        peft.apply(net, PTuning(**options))
    assert not net._forward_pre_hooks
