"""Safetensors files of a model's folder."""

import dataclasses
import difflib
import json
import os
import re
from pathlib import Path

from qlora_engine.models.streaming import Stored, stored_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DOWNLOADED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]
# the same weights once more in another format, as Llama's original/ and Mistral's consolidated.safetensors
NOT_DOWNLOADED = ["*/*", "consolidated*"]


@dataclasses.dataclass(frozen=True)
class Shards:
    """The files of a model, and which tensors each must hold.

    Attributes:
        folder: where they are.
        files: file name -> names of its tensors, or None where no index says so.
    """

    folder: Path
    files: dict[str, list[str] | None]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum((self.folder / file).stat().st_size for file in self.files)

    @property
    def paths(self) -> list[Path]:
        """Paths of all files."""
        return [self.folder / file for file in self.files]

    def tensors(self) -> list[Stored]:
        """Every tensor of every file, in the order of their bytes; only headers are read.

        Raises:
            ValueError: names the file, and the tensor, where a file is damaged, cut short or lacks one.
        """
        found = []
        for file, expected in self.files.items():
            held = stored_tensors(self.folder / file)
            missing = sorted(set(expected or ()) - {tensor.name for tensor in held})
            if missing:
                raise ValueError(f"{self.folder / file} lacks the tensor {missing[0]}, which the index says it holds")
            found += held
        return found


def resolve_folder(path_or_hub_id: str | os.PathLike) -> Path:
    """The local folder of a model; one on the Hugging Face hub is downloaded, safetensors only.

    Raises:
        FileNotFoundError: where there is no such folder, and the name cannot be one on the hub or is not there.
        ValueError: where the model on the hub has no safetensors.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    name = str(path_or_hub_id)
    if path.exists():
        raise FileNotFoundError(f"{name} is a file; expected the folder of a model")
    if path.is_absolute() or name.startswith((".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise FileNotFoundError(f"there is no model folder {name}{_near(path)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        folder = Path(snapshot_download(name, allow_patterns=DOWNLOADED, ignore_patterns=NOT_DOWNLOADED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"there is no model folder {name}{_near(path)}, and it could not be had from the hub: {first}"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{name} has no safetensors on the hub; weights in other formats are not downloaded, as reading a pickle "
            "can run code. Convert it once with transformers: AutoModel.from_pretrained(...).save_pretrained(folder)"
        )
    return folder


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    names = [p.name for p in path.parent.iterdir() if p.is_dir()]
    near = difflib.get_close_matches(path.name, names, n=3)
    return f" (there is {', '.join(str(path.parent / n) for n in near)})" if near else ""


def find_shards(folder: Path) -> Shards:
    """The safetensors files of a folder.

    Raises:
        FileNotFoundError: where there are none, or the index names one that is missing.
        ValueError: where there are only pickled weights, or the index is not readable.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            pairs = [(name, str(file)) for name, file in weight_map.items()]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not a readable index of shards: {error!r}") from error
        files: dict[str, list[str] | None] = {}
        for name, file in pairs:
            if Path(file).name != file:
                raise ValueError(f"{index} points outside its folder: {file!r}")
            files.setdefault(file, []).append(name)
        for file, names in files.items():
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder / file} is missing; the index says it holds {names[0]}")
        return Shards(folder, files)
    if (folder / SINGLE).is_file():
        return Shards(folder, {SINGLE: None})
    pickled = sorted(p.name for pattern in PICKLED for p in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"{folder} holds pickled weights only ({pickled[0]}); reading a pickle can run code. Convert it once "
            "with transformers: AutoModel.from_pretrained(...).save_pretrained(folder), which writes safetensors"
        )
    raise FileNotFoundError(f"{folder} is not a model: there is neither {SINGLE} nor {INDEX} in it")
