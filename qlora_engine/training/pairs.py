"""Preference rows as tokens: a prompt and two answers, and batches of them."""

import torch

from qlora_engine.training.data import ANSWERS, Rows, common_length
from qlora_engine.training.loss import IGNORED


def tokenize_pair(row: dict, tokenizer, max_length: int) -> dict[str, list[int]]:
    """Token numbers of a prompt, and of each answer behind it.

    Text gets the end token behind an answer; messages get the model's chat template. An answer begins where the
    tokens of prompt and answer together leave those of the prompt alone, whichever of the two answers does so first:
    tokens may merge across the end of the prompt.

    Args:
        row: with `prompt`, `chosen` and `rejected`.
        tokenizer: of the model.
        max_length: tokens to which prompt and answer together are cut, at the end.

    Returns:
        The lists `prompt`, `chosen` and `rejected`; answers are empty where the prompt fills the sequence.
    """
    prompt = _ids(row["prompt"], tokenizer, asking=True)
    whole = {name: _ids(_joined(row["prompt"], row[name], tokenizer), tokenizer) for name in ANSWERS}
    length = min(common_length(prompt, ids) for ids in whole.values())
    answers = {name: ids[length:max_length] for name, ids in whole.items()}
    return {"prompt": prompt[:length], **answers}


def _joined(prompt, answer, tokenizer):
    """Prompt and answer, text with the end token behind it."""
    end = tokenizer.eos_token
    if isinstance(prompt, str) and end is not None and not answer.endswith(end):
        answer += end
    return prompt + answer


def _ids(content, tokenizer, asking: bool = False) -> list[int]:
    if isinstance(content, str):
        return tokenizer(content)["input_ids"]
    text = tokenizer.apply_chat_template(content, add_generation_prompt=asking, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written the special ones


def pair_dataset(rows: Rows, tokenizer, max_length: int):
    """Preference rows as a `datasets.Dataset` of token numbers, without those whose prompt fills the sequence."""
    tokens = rows.dataset().map(
        tokenize_pair,
        fn_kwargs={"tokenizer": tokenizer, "max_length": max_length},
        features=_features(),
    )
    return tokens.filter(lambda row: all(row[name] for name in ANSWERS))


def _features():
    from datasets import Features, Sequence, Value

    return Features({name: Sequence(Value("int32")) for name in ("prompt", *ANSWERS)})


class PairCollator:
    """Makes a batch of pairs, padded on the right to the longest sequence.

    Called with B rows of `pair_dataset` it gives `input_ids`, `attention_mask` and `targets`, int64 `[B, 2, T]`:
    chosen first, targets -100 wherever there is no token of an answer. Rows that have it give `reference`, float32
    `[B, 2]`.

    Args:
        padding: the token number of padding.
    """

    def __init__(self, padding: int):
        self.padding = padding

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(row["prompt"]) + len(row[name]) for row in rows for name in ANSWERS)
        shape = (len(rows), len(ANSWERS), longest)
        ids, mask = torch.full(shape, self.padding), torch.zeros(shape, dtype=torch.int64)
        targets = torch.full(shape, IGNORED)
        for i, row in enumerate(rows):
            for j, name in enumerate(ANSWERS):
                sequence, start = torch.tensor(row["prompt"] + row[name]), len(row["prompt"])
                end = len(sequence)
                ids[i, j, :end], mask[i, j, :end] = sequence, 1
                targets[i, j, start:end] = sequence[start:]
        batch = {"input_ids": ids, "attention_mask": mask, "targets": targets}
        if "reference" in rows[0]:
            batch["reference"] = torch.tensor([row["reference"] for row in rows])
        return batch
