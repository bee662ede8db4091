"""Matmuls of few rows on CPUs, where the weights' bytes set the pace.

`torch.nn.functional.linear` reaches about 12 GB/s for one fp32 row on two AVX-512 cores that can read 30:
the BLAS matrix-vector path does not saturate memory. Two ways around it, both the library's own kernels:

* `pack` hands the weight to oneDNN once in its blocked layout (`packed_linear` then runs at 23 GB/s). This is
  what `torch.compile` does when it freezes a model; the plain weight can be dropped.
* `head_linear` keeps a plain weight, as an embedding that is also the LM head must stay readable by rows. A few rows
  put it on the left of the product, W @ xᵀ, where BLAS streams it at full bandwidth (a single row is padded to two);
  more rows are faster in oneDNN, which takes a plain weight as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanovllm.kernels import native

_PACK_ROWS = 16  # rows the blocked layout is chosen for; measured best or equal from 1 to 256 rows
_LEFT_ROWS = 7  # most rows for which W @ xᵀ beats oneDNN on the plain weight; measured with fp32 [49152, 576]


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN can hold this weight in its own layout; in bfloat16 that takes a CPU with AVX-512 or the like."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def pack(weight: torch.Tensor) -> torch.Tensor:
    """The weight [n, k] in oneDNN's blocked layout, an opaque tensor for `packed_linear`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACK_ROWS)


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., k] @ packed [n, k]ᵀ + bias [n] -> [..., n]."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def head_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [m, k] @ weight [n, k]ᵀ -> [m, n] on any device; fp32 on CPUs by the fastest form for m rows."""
    rows = x.shape[0]
    if native.runs(x):
        return native.linear(x, weight)
    if x.device.type != "cpu" or x.dtype != torch.float32 or rows == 0:
        return F.linear(x, weight)
    if rows == 1:  # a real second row: a stride-0 view would send BLAS down its slow path
        return torch.mm(weight, x.repeat(2, 1).t()).t()[:1]
    if rows <= _LEFT_ROWS or not can_pack(weight):
        return torch.mm(weight, x.t()).t()
    return packed_linear(x, weight, None)
