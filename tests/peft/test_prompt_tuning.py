import pytest
import torch

from qlora_engine import peft
from qlora_engine.peft import PromptTuning
from tests.peft.cases import build, inputs, logits
from tests.peft.virtual import Words, check_peft_reads, check_reads_peft

theirs = pytest.importorskip("peft")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_peft_reads_its_files(name, packed, tmp_path):
    check_peft_reads(PromptTuning(num_virtual_tokens=5), name, packed, tmp_path)


@pytest.mark.parametrize(("name", "task"), [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
def test_reads_files_of_peft(name, task, tmp_path):
    method = check_reads_peft(theirs.PromptTuningConfig(task_type=task, num_virtual_tokens=4), name, tmp_path)
    assert method.config == PromptTuning(num_virtual_tokens=4, train_head=name == "bert")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_is_the_model_on_longer_embeddings(name):
    net = build(name, False)
    batch = inputs(name)
    method = peft.apply(net, PromptTuning(num_virtual_tokens=4))
    loss, found = net(**batch).loss, logits(net, name)
    prompt = method.tensors()["prompt_embeddings"].detach()
    method.remove()
    embeds = net.get_input_embeddings()(batch["input_ids"])
    longer = torch.cat([prompt.expand(3, -1, -1), embeds], 1)
    output = net(inputs_embeds=longer)
    torch.testing.assert_close(found, output.logits[:, 4:], rtol=1e-5, atol=1e-5)
    # the last virtual token predicts the first one of the text, and no virtual token is predicted
    predicted = output.logits[:, 3:-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(predicted, batch["input_ids"].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_initialised_from_the_vocabulary():
    net = build("llama", False)
    table = net.get_input_embeddings().weight.detach()

    def start(**options):
        method = peft.apply(net, PromptTuning(tokenizer=Words(), **options))
        values = method.tensors()["prompt_embeddings"].detach()
        method.remove()
        return values

    text = start(num_virtual_tokens=5, init="text", init_text="Say if it is")
    assert torch.equal(text, table[[6, 5, 5, 5, 6]])
    assert torch.equal(start(num_virtual_tokens=0, init="text", init_text="Say it"), table[[6, 5]])
    words = start(num_virtual_tokens=3, init="vocabulary", init_words=["TLDR", "sum-marize"])
    torch.testing.assert_close(words, torch.stack([table[7], (table[6] + table[9]) / 2, table[7]]))
    mean = start(num_virtual_tokens=2, init="vocabulary", init_words=["TLDR", "a"], average=True)
    torch.testing.assert_close(mean, ((table[7] + table[4]) / 2).expand(2, -1))
    drawn = start(num_virtual_tokens=4, init="vocabulary")
    assert all((table == row).all(1).any() for row in drawn)
    random = start(num_virtual_tokens=60, init_std=0.5)
    assert 0.45 < random.std() < 0.55


def test_a_loaded_file_needs_no_tokenizer(tmp_path):
    net = build("llama", False)
    config = PromptTuning(num_virtual_tokens=0, init="text", init_text="Say it", tokenizer=Words())
    method = peft.apply(net, config)
    method.save(tmp_path)
    loaded = peft.load(build("llama", False), tmp_path)
    assert loaded.config == PromptTuning(num_virtual_tokens=2, train_head=False)
    assert torch.equal(loaded.tensors()["prompt_embeddings"], method.tensors()["prompt_embeddings"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "poetry"}, "expected one of random, vocabulary, text"),
        ({"init": "text"}, "needs init_text"),
        ({"init": "text", "init_text": "word"}, "needs a tokenizer"),
        ({"init": "text", "init_text": " ", "tokenizer": Words()}, "has no tokens"),
        ({"init": "text", "init_text": "x" * 200, "tokenizer": Words()}, "not in the model's vocabulary of 128"),
        ({"average": True}, "needs init_words"),
        ({"num_virtual_tokens": 0}, "at least 1"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    net = build("llama", False)
    before = set(net.state_dict())
    with pytest.raises(peft.MethodError, match=message):
        peft.apply(net, PromptTuning(**options))
    assert set(net.state_dict()) == before
    assert not net._forward_pre_hooks
    assert all(p.requires_grad for p in net.parameters())
