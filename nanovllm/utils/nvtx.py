"""NVTX ranges for Nsight Systems: off unless the environment says NANOVLLM_NVTX=1, and free when off.

`range("schedule")` marks a stretch of host code. `annotate(model)` names every submodule by its path: each of its calls
opens a range (`model.layers.3.mlp`), and so does code that asks for the range `of` a module, as the fused kernels do,
which call no module. A CUDA graph's replay runs no Python and shows none of them; `annotated` therefore switches them
on for a while, in which `nanovllm.profiling` runs a step operation by operation to learn which kernel is whose.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from torch import nn

VARIABLE = "NANOVLLM_NVTX"
P = ParamSpec("P")
T = TypeVar("T")
Context = contextlib.AbstractContextManager[Any]
Marker = Callable[[str], Context]  # opens a range of this name


def wanted(environment: Mapping[str, str]) -> bool:
    """Whether the environment turns the ranges on; ValueError for a value that is neither 0 nor 1."""
    value = environment.get(VARIABLE, "0")
    if value not in ("0", "1", ""):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {value!r}")
    return value == "1"


_ON = wanted(os.environ)
_ATTRIBUTE = "_nvtx_part"  # of an annotated module


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


_OFF: Context = contextlib.nullcontext()  # one for all: it holds nothing


def range(name: str) -> Context:
    """A context manager that shows the code inside it as `name` on Nsight's timeline; does nothing when off."""
    return Range(name) if _ON else _OFF


def of(module: nn.Module, part: str = "") -> Context:
    """The range of an annotated module, or of a named part of it; does nothing for any other module."""
    named: Callable[[str], Context] | None = module.__dict__.get(_ATTRIBUTE)
    return _OFF if named is None else named(part)


def ranged(index: int, part: str = "") -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: the function runs in the range `of` the module that is its positional argument `index`."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            module: Any = args[index]
            with of(module, part):
                return function(*args, **kwargs)

        return call

    return decorate


def annotate(module: nn.Module) -> None:
    """Give every call of `module`'s submodules a range named by its path. When off, not even a hook is added."""
    if _ON:
        _attach(module, Range)


@contextlib.contextmanager
def annotated(module: nn.Module, marker: Marker = Range) -> Iterator[None]:
    """Submodules have ranges inside the `with`, made by `marker`, whatever the environment says."""
    detach = _attach(module, marker)
    try:
        yield
    finally:
        for undo in detach:
            undo()


def _attach(module: nn.Module, marker: Marker) -> list[Callable[[], None]]:
    undo: list[Callable[[], None]] = []
    for path, child in module.named_modules():
        if path:
            hooks = _Hooks(path, marker)
            child.__dict__[_ATTRIBUTE] = hooks.part
            undo.append(child.register_forward_pre_hook(hooks.opens).remove)
            undo.append(child.register_forward_hook(hooks.closes, always_call=True).remove)
            undo.append(lambda child=child: child.__dict__.pop(_ATTRIBUTE, None))  # type: ignore[misc]
    return undo


class _Hooks:
    """Opens a range before a module's call and closes it behind."""

    def __init__(self, name: str, marker: Marker) -> None:
        self._name, self._marker = name, marker
        self._open: list[Context] = []

    def part(self, part: str) -> Context:
        return self._marker(f"{self._name}.{part}" if part else self._name)

    def opens(self, module: nn.Module, inputs: Any) -> None:
        context = self._marker(self._name)
        context.__enter__()
        self._open.append(context)

    def closes(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._open.pop().__exit__(None, None, None)


def _push(name: str) -> None:
    import torch

    if torch.version.cuda is not None:  # a CPU build of PyTorch has no NVTX
        torch.cuda.nvtx.range_push(name)


def _pop() -> None:
    import torch

    if torch.version.cuda is not None:
        torch.cuda.nvtx.range_pop()
