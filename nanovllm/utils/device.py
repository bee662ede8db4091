"""Which device and dtype a model runs in."""

from __future__ import annotations

import os
import sys

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """ "auto" is cuda when there is one, else cpu. ValueError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"device={name!r} but PyTorch finds no CUDA GPU: use device='cpu' or install CUDA's PyTorch"
            )
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"device={name!r} but there are {torch.cuda.device_count()} GPUs, counted from 0")
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise ValueError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N")
    return device


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def host_memory() -> int:
    """Bytes of this machine's memory, whoever uses them; where the system does not say, as good as infinite."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):  # Windows has no sysconf
        return sys.maxsize
    pages = os.sysconf("SC_PHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else sys.maxsize


def resolve_dtype(name: str, checkpoint: str, device: torch.device) -> torch.dtype:
    """ "auto" is float32 on the CPU, else the checkpoint's; bfloat16 falls back to float16 on GPUs before Ampere."""
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        if checkpoint == "bfloat16" and torch.cuda.get_device_capability(device) < (8, 0):
            return torch.float16
        # A float32 checkpoint on a GPU is a training artefact: nobody serves small models in it by default.
        return torch.bfloat16 if checkpoint == "float32" else _DTYPES[checkpoint]
    return _DTYPES[name]
