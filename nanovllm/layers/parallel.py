"""Tensor parallelism as a value: which slice of every layer this process holds, and how partial sums meet.

A `TensorParallel` is handed to each layer when it is built; there is no global process group. With
`world_size == 1` every method is the identity and nothing is opened: no port, no group, no shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """Rank and size of the tensor-parallel group; `group` is None at world size 1."""

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None

    def split(self, size: int, what: str) -> int:
        """Size of one rank's share of a dimension; ValueError where it does not divide."""
        if size % self.world_size:
            raise ValueError(f"tensor_parallel_size={self.world_size} does not divide {what} ({size}); use a divisor")
        return size // self.world_size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather_last(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenate the ranks' `x` [..., n] along the last dimension: [..., n * world_size]."""
        if self.world_size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True, slots=True)
class Build:
    """What every layer needs to know to create its parameters: dtype, device, and its share of the model."""

    dtype: torch.dtype
    device: torch.device
    tp: TensorParallel = TensorParallel()

    def parameter(self, *shape: int) -> torch.nn.Parameter:
        """An uninitialised, gradient-free parameter of this dtype on this device."""
        return torch.nn.Parameter(torch.empty(*shape, dtype=self.dtype, device=self.device), requires_grad=False)
