"""Chooses the device and the compute dtype of a run."""

import os
import re

import torch

from qlora_engine.training.errors import UsageError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" means on this machine.

    Raises:
        UsageError: for a device that is not here.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"the device {name!r} is unknown; expected auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= count:
        raise UsageError(f"the device {name!r} is not here: {count} CUDA devices are visible; see `qlora env`")
    return torch.device("cuda", index)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype that "auto", "fp32", "bf16" or "fp16" means on a device.

    bf16 is emulated, and slower than fp32, on a CPU without instructions for it: "auto" is fp32 there.

    Raises:
        UsageError: for fp16 on a CPU, or bf16 on a GPU without it.
    """
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name == "fp16" and device.type == "cpu":
        raise UsageError("--dtype fp16 cannot train on a CPU; expected fp32 or bf16")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UsageError(f"--dtype bf16: {torch.cuda.get_device_name(device)} has no bf16; expected fp16 or fp32")
    return DTYPES[name]


def see_one_gpu(name: str) -> str:
    """Hides all GPUs but one from this process, and returns that one's new name.

    transformers' Trainer spreads a model over all the GPUs it sees, and always begins with the first.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".

    Returns:
        `name`, or "cuda" where it was "cuda:N".

    Raises:
        UsageError: for another than the first GPU, where CUDA is in use already and nothing can be hidden.
    """
    match = re.fullmatch(r"cuda:(\d+)", name)
    if match and int(match[1]) and torch.cuda.is_initialized():
        raise UsageError(
            f"--device {name}: this process uses CUDA already and would train on its first GPU; start it with "
            f"CUDA_VISIBLE_DEVICES={match[1]} and --device cuda"
        )
    if name == "cpu" or torch.cuda.is_initialized() or (match is None and name not in ("auto", "cuda")):
        return name
    visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    if not visible and torch.cuda.is_available():
        visible = [str(index) for index in range(torch.cuda.device_count())]
    index = int(match[1]) if match else 0
    if index >= len(visible):
        return name
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[index]
    return "cuda" if match else name
