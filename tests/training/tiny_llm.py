"""A tiny random Llama with a tokenizer of its own, saved as a Hugging Face folder, and small data files for it."""

import json
import random
from pathlib import Path

import torch

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLOURS = ["red", "green", "blue", "white", "black", "yellow"]
THINGS = ["house", "tree", "car", "cat", "stone", "river", "cloud", "door"]


def save_model(folder: Path, *, chat_template: bool = True) -> Path:
    """Two layers of width 64; a byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([row["prompt"] + row["completion"] for row in pairs(200)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    if chat_template:
        fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(fast),
        max_position_embeddings=256,
        initializer_range=0.1,  # with the usual 0.02, a frozen tied head could hardly prefer any token
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def pairs(count: int, seed: int = 0) -> list[dict]:
    """Prompt/completion rows that a tiny model can learn."""
    draw = random.Random(seed)
    return [
        {
            "prompt": f"the {thing} is",
            "completion": f" {COLOURS[len(thing) % len(COLOURS)]} like a {draw.choice(THINGS)}",
        }
        for thing in (draw.choice(THINGS) for _ in range(count))
    ]


def preferences(count: int, seed: int = 0) -> list[dict]:
    """Prompt/chosen/rejected rows that a tiny model can learn: the colour of a thing is chosen over another one."""
    draw = random.Random(seed)
    rows = []
    for row in pairs(count, seed):
        colour, *rest = row["completion"].split()
        other = draw.choice([one for one in COLOURS if one != colour])
        rejected = " ".join(["", other, *rest])
        rows.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected})
    return rows


def write_jsonl(path: Path, rows: list) -> Path:
    """Writes rows as JSON, one a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
