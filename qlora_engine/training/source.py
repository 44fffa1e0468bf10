"""Where a model comes from: a folder, a GGUF file, or the hub. The result is always a folder on this machine."""

import difflib
import os
import re
from pathlib import Path

from qlora_engine.training.errors import ModelError, as_usage_error, one_sentence

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# never pickles: a checkpoint is data, not a program
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def resolve_model(name: str) -> Path:
    """The folder of a model that the user named.

    Args:
        name: a folder with config.json, a .gguf file or a folder with one, or a hub id such as "org/name".

    Raises:
        ModelError: where there is no such model, with what comes near.
    """
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return path
    with as_usage_error(ModelError):
        from qlora_engine.models.gguf import cached_conversion, find_gguf

        if find_gguf(path):
            return cached_conversion(path)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise ModelError(f"{path} holds an adapter, not a model; pass it as --adapter, and its base as --model")
        held = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise ModelError(f"{path} is not a model folder: it has no config.json (it holds {held})")
    if path.is_file():
        raise ModelError(f"{path} is a file; expected a model folder, a .gguf file or a hub id")
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"the model path {name} does not exist{_near(path)}")
    return _from_hub(name, path)


def is_on_this_machine(name: str) -> bool:
    """Whether a model's name means a path that exists here."""
    return Path(name).expanduser().exists()


def work_offline() -> None:
    """Keeps transformers from asking the hub about local files. To be called before it is imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _from_hub(name: str, path: Path) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = one_sentence(error).split(". ")[0][:160]
        raise ModelError(
            f"the model path {name} does not exist{_near(path)}, and it could not be had from the hub: {reason}"
        ) from error


def _near(path: Path) -> str:
    parent = path.parent if path.parent.is_dir() else None
    if parent is None:
        return ""
    names = [entry.name for entry in parent.iterdir() if entry.is_dir() or entry.suffix == ".gguf"]
    close = difflib.get_close_matches(path.name, names, n=3)
    return f" (near it: {', '.join(str(parent / name) for name in close)})" if close else ""
