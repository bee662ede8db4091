"""Linear layers that know which slice of the checkpoint is theirs.

Megatron's split: a column-parallel layer holds a slice of the output rows and needs no communication; a
row-parallel layer holds a slice of the inputs and sums its partial results over the ranks. Projections that
read the same input (q, k, v; gate, up) are packed into one weight, so that one matmul does them all.
Layers know nothing of file formats: `load(name, tensor, part)` takes one checkpoint tensor under its own name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.kernels import cpu_linear
from nanovllm.layers.parallel import Build


def check_shape(name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> None:
    """Raise the one error of a checkpoint tensor that does not fit."""
    if tuple(expected) != tuple(found):
        raise ValueError(
            f"tensor {name} has shape {list(found)} where the model expects {list(expected)}: "
            "the weights do not belong to this config.json"
        )


class LinearBase(nn.Module):
    """y = x Wᵀ + b with W [n, k]; x [..., k] -> y [..., n]."""

    def __init__(self, n: int, k: int, bias: bool, build: Build) -> None:
        super().__init__()
        self.tp = build.tp
        self.weight = build.parameter(n, k)
        self.bias = build.parameter(n) if bias else None
        self._packed: torch.Tensor | None = None

    def pack_for_cpu(self) -> None:
        """Replace the weight by oneDNN's blocked form: twice the speed of a plain matmul at small batch on CPUs.

        The plain weight is freed, so memory holds one tensor twice for a moment, never the model.
        """
        if cpu_linear.can_pack(self.weight):
            self._packed = cpu_linear.pack(self.weight)
            self.weight.data = self.weight.new_empty(0)

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """The matmul alone, without communication."""
        if self._packed is not None:
            return cpu_linear.packed_linear(x, self._packed, self.bias)
        return F.linear(x, self.weight, self.bias)


class ColumnParallelLinear(LinearBase):
    """Packed projections of one input: output rows [part 0 | part 1 | …], each part split over the ranks."""

    def __init__(self, k: int, part_sizes: list[int], bias: bool, build: Build) -> None:
        self.full_sizes = part_sizes
        self.part_sizes = [build.tp.split(size, "an output dimension") for size in part_sizes]
        super().__init__(sum(self.part_sizes), k, bias, build)

    def source_rows(self, part: int) -> slice:
        """Rows of the checkpoint's tensor that this rank holds."""
        start = self.tp.rank * self.part_sizes[part]
        return slice(start, start + self.part_sizes[part])

    def load(self, name: str, tensor: torch.Tensor, part: int = 0) -> None:
        """Copy one checkpoint tensor, weight [N, K] or bias [N], into this rank's rows of `part`."""
        target = self.bias if name.endswith(".bias") else self.weight
        if target is None:
            raise ValueError(f"tensor {name} is a bias where the model has none: config.json and weights disagree")
        check_shape(name, (self.full_sizes[part], *target.shape[1:]), tuple(tensor.shape))
        start = sum(self.part_sizes[:part])
        target.data[start : start + self.part_sizes[part]].copy_(tensor[self.source_rows(part)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] -> this rank's outputs [..., sum(part_sizes)]."""
        return self.linear(x)


class QKVParallelLinear(ColumnParallelLinear):
    """q, k and v in one matmul. With more ranks than KV heads, each KV head lives on several ranks."""

    def __init__(self, k: int, num_heads: int, num_kv_heads: int, head_dim: int, bias: bool, build: Build) -> None:
        world = build.tp.world_size
        build.tp.split(num_heads, "the attention heads")
        self.kv_copies = max(1, world // num_kv_heads)
        if num_kv_heads % world and world % num_kv_heads:
            raise ValueError(f"tensor_parallel_size={world} fits neither into nor around {num_kv_heads} KV heads")
        kv_rows = num_kv_heads * head_dim
        super().__init__(k, [num_heads * head_dim, kv_rows * self.kv_copies, kv_rows * self.kv_copies], bias, build)
        self.full_sizes = [num_heads * head_dim, kv_rows, kv_rows]

    def source_rows(self, part: int) -> slice:
        """Rows of the checkpoint's tensor that this rank holds; KV heads are shared by `kv_copies` ranks."""
        rank = self.tp.rank if part == 0 else self.tp.rank // self.kv_copies
        return slice(rank * self.part_sizes[part], (rank + 1) * self.part_sizes[part])


class RowParallelLinear(LinearBase):
    """Holds a slice of the input columns; the partial products are summed over the ranks."""

    def __init__(self, k: int, n: int, bias: bool, build: Build) -> None:
        self.full_k = k
        super().__init__(n, build.tp.split(k, "an input dimension"), bias, build)

    def load(self, name: str, tensor: torch.Tensor, part: int = 0) -> None:
        """Copy one checkpoint tensor, weight [N, K] or bias [N]; the bias counts on rank 0 alone."""
        if name.endswith(".bias"):
            if self.bias is None:
                raise ValueError(f"tensor {name} is a bias where the model has none: config.json and weights disagree")
            check_shape(name, tuple(self.bias.shape), tuple(tensor.shape))
            self.bias.data.copy_(tensor) if self.tp.rank == 0 else self.bias.data.zero_()
            return
        n, k = self.weight.shape
        check_shape(name, (n, self.full_k), tuple(tensor.shape))
        self.weight.data.copy_(tensor[:, self.tp.rank * k : (self.tp.rank + 1) * k])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k / world_size] -> y [..., n], the same on every rank."""
        return self.tp.all_reduce(self.linear(x))
