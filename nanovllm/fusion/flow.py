"""Watch one forward pass: which modules produce a tensor, who reads its memory afterwards, which calls are gates.

Every operator that PyTorch dispatches is seen, whatever Python wrote it, and compared by storage: views, slices and
aliases of a tensor count as that tensor. What is learned holds for the calls that were watched. Whether a module is a
norm, and whether a group may be fused, is `detect`'s question.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm.fusion.gate import Gate, GateTrace


@dataclass
class Produced:
    """One output of a module without children, and what became of it."""

    module: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    storage: StorageWeakRef
    row_stride: int
    linears: list[str] = field(default_factory=list)  # that read it, in order
    problems: list[str] = field(default_factory=list)  # readers that are no linears, and how it escapes
    gates: list[Gate | str] = field(default_factory=list)  # calls with all of it that apply silu: a gate, or why not

    def is_whole(self, value: torch.Tensor) -> bool:
        """Whether an alias of it has all of its rows, each of them whole."""
        same = value.numel() == self.shape.numel() and value.shape[-1] == self.shape[-1]
        return same and not any(stride % self.row_stride for stride in value.stride()[:-1])

    def note(self, problem: str) -> None:
        """Keep a problem once."""
        if problem not in self.problems:
            self.problems.append(problem)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested lists, tuples, mappings (such as Hugging Face outputs)."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from tensors(item)


class Flow(TorchDispatchMode):
    """A context in which forward passes of `model` are watched; `produced` and `sources` then tell what was seen."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(module): name for name, module in model.named_modules()}
        self.modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self.called: dict[str, None] = {}  # modules in the order in which they first ran
        self.produced: list[Produced] = []
        self.sources: dict[str, list[Produced | None]] = {}  # linear -> what each of its calls read
        self._alive: dict[int, Produced] = {}  # storage -> its record; the weak reference keeps the key unique
        self._inside: list[Produced | None] = []  # what the linears that are running now read
        self._running: list[tuple[GateTrace, Produced] | None] = []  # one entry a module that is running now
        self._gates: list[tuple[GateTrace, Produced, Gate]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Flow:
        for module in self.modules:
            self._handles += [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, with_kwargs=True),
            ]
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()

    def end_of_call(self) -> None:
        """Call it after a forward pass whose result is still referenced: what lives now has escaped."""
        if any(not p.storage.expired() for p in self._alive.values()):
            gc.collect()
        for produced in self._alive.values():
            if not produced.storage.expired():
                produced.note("its output outlives the forward pass: it is returned or stored somewhere")
        for trace, produced, gate in self._gates:
            kept = not all(storage.expired() for storage in trace.storages)
            produced.gates.append(f"what {trace.module} computes outlives the forward pass" if kept else gate)
        self._alive.clear()
        self._gates.clear()

    def _record(self, tensor: torch.Tensor) -> Produced | None:
        """What a tensor is an alias of, if that is watched."""
        try:
            return self._alive.get(tensor.untyped_storage()._cdata)
        except NotImplementedError:  # tensors without storage: sparse ones, some subclasses
            return None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self.names[id(module)]
        self.called.setdefault(name)
        value = next(tensors([args, kwargs]), None)
        record = None if value is None else self._record(value)
        whole = record is not None and value is not None and record.is_whole(value)
        linear = isinstance(module, nn.Linear)
        for trace, source in self._traces():
            trace.enter(name, linear, whole and record is source, args)
        if linear and record is not None and value is not None:
            if name not in record.linears:
                record.linears.append(name)
            if not whole:
                record.note(f"{name} reads only a part of its output or another shape of it, {list(value.shape)}")
        if linear:
            self.sources.setdefault(name, []).append(record)
            self._inside.append(record)
        alone = len(args) == 1 and not kwargs and args[0] is value
        parent = not linear and next(module.children(), None) is not None
        self._running.append((GateTrace(name), record) if record is not None and whole and alone and parent else None)

    def _traces(self) -> list[tuple[GateTrace, Produced]]:
        return [entry for entry in self._running if entry is not None]

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        name = self.names[id(module)]
        ended = self._running.pop()
        if ended is not None:
            trace, source = ended
            gate = trace.finish(output)
            if gate is not None:
                self._gates.append((trace, source, gate))
            elif trace.activated and trace.fault is not None:
                source.gates.append(trace.fault)
        for trace, _ in self._traces():
            trace.leave(name, output)
        if isinstance(module, nn.Linear):
            self._inside.pop()
            return
        given = {id(record) for t in tensors([args, kwargs]) if (record := self._record(t))}
        for tensor in tensors(output):
            record = self._record(tensor)
            if record is not None and id(record) not in given:
                record.note(f"its output leaves {name or 'the model'}, which may be called by itself")
        if not isinstance(output, torch.Tensor) or next(module.children(), None) is not None:
            return
        if output.dim() and output.is_floating_point() and self._record(output) is None:
            self._watch(name, args, kwargs, output)

    def _watch(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        storage = output.untyped_storage()
        record = Produced(
            name, output.shape, output.dtype, output.device, StorageWeakRef(storage), max(1, output.shape[-1])
        )
        if kwargs or len(args) != 1 or not isinstance(args[0], torch.Tensor):
            record.note("it is called with something else than one tensor")
        elif args[0].shape != output.shape or args[0].dtype != output.dtype:
            record.note("its output has another shape or dtype than its input")
        elif not output.is_contiguous() or storage._cdata == args[0].untyped_storage()._cdata:
            record.note("its output is a view, not a tensor of its own")
        self._alive[storage._cdata] = record
        self.produced.append(record)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        inside = self._inside[-1] if self._inside else None
        inputs = list(tensors([args, kwargs]))
        for tensor in inputs:
            record = self._record(tensor)
            if record is None or (record is inside and not func._schema.is_mutable):
                continue
            if func._schema.is_mutable:
                record.note(f"its output meets an operator that writes in place, {func}")
            elif not func.is_view:
                record.note(f"its output is also read by {func}")
        output = func(*args, **kwargs)
        for trace, _ in self._traces():
            trace.operator(func, inputs, output)
        return output
