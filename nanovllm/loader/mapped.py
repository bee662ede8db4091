"""Tensors of a checkpoint that are read while they are copied, a few rows at a time.

A file that is mapped as a whole counts, page by page, as memory of this process while it is read, so that a loaded
model would be there twice. Here every piece is a mapping of its own, which ends as soon as the piece is copied: the
peak is the model plus one piece. This module knows bytes and rows; file formats are its callers' business.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch

_PIECE = 1 << 20  # elements that are in flight at once: 4 MiB of fp32, and as much again several times to dequantise


def map_bytes(path: Path, offset: int, size: int) -> torch.Tensor:
    """Bytes [offset, offset + size) of a file as a uint8 tensor [size], mapped, not copied; the file is not changed.

    The mapping lives as long as the tensor and its views.
    """
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        # Copy-on-write, because PyTorch warns about memory it could not write to.
        pages = mmap.mmap(file.fileno(), offset - start + size, access=mmap.ACCESS_COPY, offset=start)
    return torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=offset - start)


class CheckpointTensor:
    """Stands for a tensor [rows, …] that is still in its file.

    It answers what loading asks of a tensor: `shape`, `dtype`, `dim()`, slices, and to be the source of
    `parameter.copy_(...)`, which it performs piece by piece (PyTorch hands the call over: `__torch_function__`).
    Everything else needs `read()`, which returns the whole as a plain tensor.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        read_rows: Callable[[int, int], torch.Tensor],
        index: tuple[slice, ...] = (),
    ) -> None:
        """`read_rows(a, b)` returns rows a … b - 1 of the stored tensor, all their columns; `index` narrows it."""
        self._full, self._read_rows, self.dtype = shape, read_rows, dtype
        self._index = index + (slice(None),) * (len(shape) - len(index))
        sizes = [len(range(n)[part]) for n, part in zip(shape, self._index, strict=True)]
        self.shape = torch.Size(sizes)

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> CheckpointTensor:
        """A narrower tensor; nothing is read. Slices without steps only."""
        parts = index if isinstance(index, tuple) else (index,)
        parts += (slice(None),) * (len(self.shape) - len(parts))
        narrowed = []
        for n, outer, inner in zip(self._full, self._index, parts, strict=True):
            rows = range(n)[outer][inner]
            if rows.step != 1:
                raise ValueError(f"a checkpoint tensor takes slices without steps, got {inner}")
            narrowed.append(slice(rows.start, rows.stop))
        return CheckpointTensor(self._full, self.dtype, self._read_rows, tuple(narrowed))

    def copy_to(self, target: torch.Tensor) -> None:
        """Fill `target`, of the same shape, any dtype and device."""
        if target.shape != self.shape:
            raise ValueError(f"cannot copy a tensor of shape {list(self.shape)} into one of {list(target.shape)}")
        rows = range(self._full[0])[self._index[0]]
        step = max(1, _PIECE // max(1, prod(self._full[1:])))
        columns = (slice(None), *self._index[1:])
        for a in range(0, len(rows), step):
            b = min(a + step, len(rows))
            target[a:b].copy_(self._read_rows(rows.start + a, rows.start + b)[columns])

    def read(self) -> torch.Tensor:
        """The whole as a plain CPU tensor of its own dtype."""
        result = torch.empty(self.shape, dtype=self.dtype)
        self.copy_to(result)
        return result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.copy_ or not isinstance(args[1], cls):
            return NotImplemented
        args[1].copy_to(args[0])
        return args[0]
