"""What the tests of methods with virtual tokens share."""

import pytest
import torch

from qlora_engine import peft
from tests.peft.cases import build, inputs, logits


class Words:
    """A tokenizer of the tiny models: a word's token is 3 + its length, a word with a hyphen has two."""

    def __call__(self, text, add_special_tokens=True):
        ids = [3 + len(part) for part in text.replace("-", " ").split()]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


def their_logits(model, name):
    """The output of a model in PEFT for the batch of `logits`; virtual positions are taken away."""
    batch = inputs(name)
    length = batch.pop("labels").shape[-1]
    with torch.no_grad():
        found = model(**batch).logits
    return found if name == "bert" else found[:, -length:]


def disturb(tensors):
    """Numbers as after a training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)


def check_peft_reads(config, name, packed, folder):
    """A file saved here gives PEFT the same logits, and the same generation."""
    theirs = pytest.importorskip("peft")
    net = build(name, packed)
    method = peft.apply(net, config)
    disturb(method.trainable_parameters().values())
    method.save(folder)
    other = theirs.PeftModel.from_pretrained(build(name, packed), folder)
    torch.testing.assert_close(their_logits(other, name), logits(net, name), rtol=1e-5, atol=1e-5)
    if name != "bert":
        ids = inputs(name)["input_ids"]
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        options["attention_mask"] = torch.ones_like(ids)
        assert torch.equal(other.generate(input_ids=ids, **options), net.generate(ids, **options))
    return method


def check_reads_peft(config, name, folder):
    """A file saved by PEFT gives the same logits and, with labels, the same loss here."""
    theirs = pytest.importorskip("peft")
    their_model = theirs.get_peft_model(build(name, False), config).eval()
    disturb(p for p in their_model.parameters() if p.requires_grad)
    their_model.save_pretrained(folder)
    net = build(name, False)
    method = peft.load(net, folder)
    torch.testing.assert_close(logits(net, name), their_logits(their_model, name), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(net(**inputs(name)).loss, their_model(**inputs(name)).loss, rtol=1e-5, atol=1e-6)
    return method
