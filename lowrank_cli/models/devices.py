"""Devices and dtypes by the names that are typed."""

from __future__ import annotations

import torch

from lowrank_cli.errors import UsageError, unknown


def dtype_of(name: str, device: torch.device | str) -> torch.dtype:
    """The dtype of a name; auto is bfloat16 on a GPU that computes in it, else float32."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name == "auto":
        device = torch.device(device)
        if device.type != "cuda":
            return torch.float32
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    if name not in named:
        raise unknown("dtype", name, ["auto", *named], "--dtype")
    return named[name]


def device_of(name: str) -> torch.device:
    """The device of a name such as auto, cpu, cuda or cuda:1; raises UsageError if it is not on this machine."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device is {name!r}", "it takes auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= count:
        there = ", ".join(f"cuda:{i}" for i in range(count)) or f"no GPU that PyTorch {torch.__version__} can use"
        raise UsageError(f"there is no device {name} on this machine", f"here: cpu, {there}; --device auto chooses")
    return device
