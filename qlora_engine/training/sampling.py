"""Generates text: the report's samples, and `qlora generate`."""

from collections.abc import Iterator

import torch

from qlora_engine.training.data import PREFERENCES, Rows
from qlora_engine.training.errors import UsageError

TEXT_PROMPT_WORDS = 8


def sample_prompts(rows: Rows, count: int) -> list[tuple[object, str]]:
    """(prompt, reference answer) of the first rows; a prompt is text or a list of messages."""
    found = []
    for row in rows.rows[:count]:
        if rows.format in ("prompt/completion", *PREFERENCES):
            prompt, answer = row["prompt"], row["chosen" if rows.format in PREFERENCES else "completion"]
            found.append((prompt, answer if isinstance(answer, str) else answer[0]["content"]))
        elif rows.format == "messages":
            last = max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
            found.append((row["messages"][:last], row["messages"][last]["content"]))
        else:
            words = row["text"].split(" ")
            found.append((" ".join(words[:TEXT_PROMPT_WORDS]), " ".join(words[TEXT_PROMPT_WORDS:])))
    return [(prompt, answer) for prompt, answer in found if prompt]


def encode_prompts(tokenizer, prompts: list, device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, int64 [B, T], padded on the left.

    Args:
        prompts: texts, or lists of messages for the chat template.

    Raises:
        UsageError: where messages are given and the tokenizer has no chat template.
    """
    sequences = []
    for prompt in prompts:
        if isinstance(prompt, str):
            sequences.append(tokenizer(prompt)["input_ids"] or [_pad_id(tokenizer)])
        else:
            check_chat_template(tokenizer)
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            # the template has already written the special tokens
            sequences.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    longest = max(map(len, sequences))
    ids = [[_pad_id(tokenizer)] * (longest - len(s)) + s for s in sequences]
    mask = [[0] * (longest - len(s)) + [1] * len(s) for s in sequences]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def check_chat_template(tokenizer) -> None:
    """Raises UsageError if the tokenizer cannot render a conversation."""
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("this model's tokenizer has no chat template; use prompt/completion or text, without --chat")


@torch.inference_mode()
def greedy_samples(model, tokenizer, prompts: list, max_new_tokens: int) -> list[str]:
    """The most likely continuation of each prompt, all prompts in one batch."""
    if not prompts:
        return []
    training = model.training
    model.eval()
    inputs = encode_prompts(tokenizer, prompts, next(model.parameters()).device)
    with _autocast(model):
        ids = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=_pad_id(tokenizer),
            # a sampling model's own defaults would only draw warnings here
            temperature=None,
            top_p=None,
            top_k=None,
        )
    model.train(training)
    return [tokenizer.decode(row[inputs["input_ids"].shape[1] :], skip_special_tokens=True) for row in ids]


@torch.inference_mode()
def stream(
    model, tokenizer, prompt, *, max_new_tokens: int, temperature: float, top_p: float, top_k: int
) -> Iterator[str]:
    """Pieces of the continuation of one prompt, as they are generated; temperature 0 is greedy."""
    from threading import Thread

    from transformers import TextIteratorStreamer

    inputs = encode_prompts(tokenizer, [prompt], next(model.parameters()).device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    failure = []

    def work():
        try:
            with torch.inference_mode(), _autocast(model):
                model.generate(
                    **inputs,
                    **sampling,
                    max_new_tokens=max_new_tokens,
                    use_cache=True,
                    pad_token_id=_pad_id(tokenizer),
                    streamer=streamer,
                )
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]


def _pad_id(tokenizer) -> int:
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0


def _autocast(model):
    """16-bit activations beside float32 adapters, as in training."""
    dtype = getattr(model.config, "dtype", None)
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=dtype, enabled=dtype in (torch.float16, torch.bfloat16))
