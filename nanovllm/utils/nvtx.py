"""NVTX ranges for Nsight Systems: off unless the environment says NANOVLLM_NVTX=1, and free when off.

`range("schedule")` marks a stretch of host code; `annotate(model)` marks every call of every submodule by its path
(`model.layers.3.mlp`), through hooks that exist only when the ranges are on. A CUDA graph's replay runs no Python, so
it shows none of them: `nanovllm.profiling.attribute` finds the layers there by their repeating order.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

VARIABLE = "NANOVLLM_NVTX"


def wanted(environment: Mapping[str, str]) -> bool:
    """Whether the environment turns the ranges on; ValueError for a value that is neither 0 nor 1."""
    value = environment.get(VARIABLE, "0")
    if value not in ("0", "1", ""):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {value!r}")
    return value == "1"


_ON = wanted(os.environ)


class Range:
    """One NVTX range of the calling thread, for use in a `with`."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        _push(self.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _pop()


_OFF: contextlib.AbstractContextManager[None] = contextlib.nullcontext()  # one for all: it holds nothing


def range(name: str) -> contextlib.AbstractContextManager[None]:
    """A context manager that shows the code inside it as `name` on Nsight's timeline; does nothing when off."""
    return Range(name) if _ON else _OFF


def annotate(module: nn.Module, prefix: str = "") -> None:
    """Give every call of `module`'s submodules a range named by its path. When off, not even a hook is added."""
    if not _ON:
        return
    for path, child in module.named_modules():
        name = ".".join(part for part in (prefix, path) if part)
        if name:
            child.register_forward_pre_hook(_Opens(name))
            child.register_forward_hook(_closes, always_call=True)


class _Opens:
    """A forward pre-hook that pushes a name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        _push(self.name)


def _closes(module: nn.Module, inputs: Any, output: Any) -> None:
    _pop()


def _push(name: str) -> None:
    import torch

    if torch.version.cuda is not None:  # a CPU build of PyTorch has no NVTX
        torch.cuda.nvtx.range_push(name)


def _pop() -> None:
    import torch

    if torch.version.cuda is not None:
        torch.cuda.nvtx.range_pop()
