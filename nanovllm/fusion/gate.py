"""Is one call of a module `down(silu(gate(y)) * up(y))` and nothing else? Watched operator by operator.

`gate` and `up` are linears on the same y, or the two halves of what one linear makes of it; `down` is any child. What
counts is which memory each operator reads and writes, down to offset and stride: names, activations' classes and the
order of the factors do not matter, and an operator too many is one too many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True, slots=True)
class Gate:
    """A module whose calls compute SwiGLU and hand the product to `down`."""

    module: str
    down: str  # the name of a child
    linears: tuple[str, ...]  # (gate, up), or the one linear that computes both, gate rows first


class Value(NamedTuple):
    """A tensor's place in memory. Its storage cannot be reused while somebody holds a weak reference to it."""

    storage: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    def half(self, second: bool) -> Value:
        """The first or second half of the last dimension."""
        width = self.shape[-1] // 2
        offset = self.offset + second * width * self.stride[-1]
        return Value(self.storage, offset, torch.Size((*self.shape[:-1], width)), self.stride)


class GateTrace:
    """One call of `module` while it runs. `fault`: why it is no gate; only worth telling if `activated`."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.fault: str | None = None
        self.storages: list[StorageWeakRef] = []  # of all values but the result: they must not outlive the call
        self._linears: dict[str, Value] = {}
        self._activated: tuple[Value, Value] | None = None  # what silu read and wrote
        self._product: Value | None = None
        self._names: tuple[str, ...] = ()
        self._down: str | None = None
        self._result: Value | None = None
        self._inside = 0  # modules deep in a linear or in `down`, whose operators are their own business
        self._in_down = False

    def enter(self, name: str, linear: bool, reads_source: bool, args: tuple[Any, ...]) -> None:
        """A module below this one is called. `reads_source`: its input is all of y."""
        if self._inside:
            self._inside += 1
            return
        if self._product is not None and len(args) == 1 and _is_plain(args[0]) and _value(args[0]) == self._product:
            self._fail(self._down is not None, f"{name} reads silu(gate) * up as well")
            self._down, self._in_down, self._inside = name, True, 1
        elif linear:
            self._fail(not reads_source or name in self._linears, f"{name} has another part in {self.module}")
            self._in_down, self._inside = False, 1

    def leave(self, name: str, output: Any) -> None:
        """The module that was entered last and has not been left returns."""
        if not self._inside:
            return
        self._inside -= 1
        if self._inside:
            return
        if not _is_plain(output):
            self._fail(True, f"{name} does not return one plain tensor")
        elif self._in_down:
            self._result = _value(output)
        else:
            self._linears[name] = self._keep(output)

    def operator(self, func: Any, inputs: list[torch.Tensor], output: Any) -> None:
        """PyTorch has run `func`."""
        if self._inside or (func.is_view and not func._schema.is_mutable):
            return
        values = [_value(t) for t in inputs if _is_plain(t)]
        if len(values) != len(inputs) or not _is_plain(output):
            self._fail(True, f"{self.module} also runs {func}")
        elif func is torch.ops.aten.silu.default and self._activated is None and self._place(values[0]) is not None:
            self._activated = values[0], self._keep(output)
        elif func is torch.ops.aten.mul.Tensor and self._product is None and self._is_gate(values):
            self._product = self._keep(output)
        else:
            self._fail(True, f"{self.module} also runs {func}")

    def finish(self, output: Any) -> Gate | None:
        """What the call was, now that the module has returned `output`; `fault` tells why None."""
        whole = _is_plain(output) and _value(output) == self._result
        child = (self._down or "").removeprefix(f"{self.module}." if self.module else "")
        self._fail(not whole, f"{self.module} does more than to return what a child makes of silu(gate) * up")
        self._fail("." in child, f"{self._down} is no child of {self.module}")
        return Gate(self.module, child, self._names) if self.fault is None else None

    @property
    def activated(self) -> bool:
        """Whether silu was applied to what a linear made of y."""
        return self._activated is not None

    def _fail(self, failed: bool, fault: str) -> None:
        if failed and self.fault is None:
            self.fault = fault

    def _place(self, value: Value) -> tuple[str, int | None] | None:
        """Which linear made a value: (its name, 0 or 1 for a half and None for all of it)."""
        for name, made in self._linears.items():
            if value == made:
                return name, None
            for second in (0, 1):
                if value == made.half(bool(second)):
                    return name, second
        return None

    def _is_gate(self, values: list[Value]) -> bool:
        """Whether this is silu(gate) * up; if so, `_names` become the linears behind it."""
        if self._activated is None or len(values) != 2 or values[0].shape != values[1].shape:
            return False
        others = [value for value in values if value != self._activated[1]]
        gate, up = self._place(self._activated[0]), self._place(others[0]) if len(others) == 1 else None
        if gate is None or up is None or (gate[1] is None) != (up[1] is None):
            return False
        if gate[1] is None:
            self._names = gate[0], up[0]
            return gate[0] != up[0]
        self._names = (gate[0],)
        self._fail(gate[1] == 1, f"the up rows of {gate[0]} come before its gate rows")
        return gate[0] == up[0] and gate[1] != up[1]

    def _keep(self, tensor: torch.Tensor) -> Value:
        self.storages.append(StorageWeakRef(tensor.untyped_storage()))
        return _value(tensor)


def _is_plain(value: Any) -> bool:
    """Whether this is a tensor with memory of the usual kind."""
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided


def _value(tensor: torch.Tensor) -> Value:
    return Value(tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.shape, tensor.stride())
