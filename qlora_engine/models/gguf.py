"""Turns a GGUF file into an ordinary Hugging Face folder, once."""

import hashlib
import json
import os
from pathlib import Path

from qlora_engine.models.checkpoint import WEIGHT_FILES, check_no_adapter
from qlora_engine.models.files import atomic_directory

CACHE_VARIABLE = "QLORA_ENGINE_CACHE"


def find_gguf(path: str | Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a folder; None where there is none.

    Raises:
        ValueError: for a folder with several.
    """
    path = Path(path)
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" else None
    if not path.is_dir():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(
            f"{path} holds {len(files)} GGUF files ({', '.join(f.name for f in files)}); name one of them"
        )
    return files[0] if files else None


def convert_gguf(path: str | Path, out_dir: str | Path, dtype: str = "bfloat16") -> Path:
    """Writes a GGUF file's model and tokenizer as config.json, safetensors and tokenizer files.

    transformers dequantizes a GGUF file each time it loads it, in minutes for large models, and refuses to save
    what it loaded, because the model still counts as quantized.

    Args:
        path: a .gguf file, or a folder that holds one.
        out_dir: folder to write; older weights in it are replaced, other files, such as the GGUF file, stay.
        dtype: "bfloat16", "float16" or "float32".

    Returns:
        `out_dir`.

    Raises:
        FileNotFoundError: where there is no GGUF file.
        ValueError: where the file is not readable or its architecture is unknown to transformers.
        FileExistsError: where the folder holds an adapter.
    """
    source = find_gguf(path)
    if source is None:
        raise FileNotFoundError(f"there is no GGUF file at {path}")
    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{source} is not a GGUF file: it does not begin with the letters GGUF")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=getattr(torch, dtype))
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    # the same tensors in a model of the same class that was never quantized
    with torch.device("meta"):
        plain = type(model)(type(model.config)(**settings))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.config.dtype = getattr(torch, dtype)
    plain.generation_config = model.generation_config
    check_no_adapter(out_dir)
    with atomic_directory(out_dir, replaces=WEIGHT_FILES) as folder:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Path(out_dir)


def cached_conversion(path: str | Path) -> Path:
    """The folder a GGUF file was converted to, converting it first where that has not happened.

    The cache is $QLORA_ENGINE_CACHE, else $XDG_CACHE_HOME/qlora_engine, else ~/.cache/qlora_engine.
    """
    source = find_gguf(path)
    if source is None:
        raise FileNotFoundError(f"there is no GGUF file at {path}")
    base = os.environ.get(CACHE_VARIABLE)
    if not base:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_engine"
    facts = source.stat()
    identity = json.dumps([str(source.resolve()), facts.st_size, facts.st_mtime_ns])
    target = Path(base) / f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if not (target / "config.json").exists():
        convert_gguf(source, target)
    return target
