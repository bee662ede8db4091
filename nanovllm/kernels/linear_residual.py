"""A linear layer that adds its result to the residual stream: y = W x + b + residual, in one kernel.

The kernels are those of `rms_norm_linear_fusion` without the norm; read that module for grid, cast order and policy.
In a decoder layer this is the output projection and the down projection, each followed by the addition that the next
norm would otherwise do. `residual` may be the output: the stream is then updated in place.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.fusion_config import FusionConfig, Problem
from nanovllm.kernels.jit import require_unit_stride, use_triton
from nanovllm.kernels.rms_norm_linear_fusion import dtype_name, launch


def linear_residual(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    config: FusionConfig,
) -> torch.Tensor:
    """x: [M, K], rows may be strided; weight: [N, K]; residual: [M, N], contiguous; bias: [N]. All of one dtype.

    Adds to `residual` in place and returns it. config: "unfused" is one cuBLAS call, whose epilogue adds; a bias is
    added, and rounded, before it. ValueError for tensors that the kernels cannot read or write in place.
    """
    if config.variant == "unfused" or not use_triton(x):
        return _add_linear_(x, weight, residual, bias)
    require_unit_stride(x=x, weight=weight)
    if not residual.is_contiguous():
        raise ValueError(f"residual must be contiguous, it is written in place: got strides {residual.stride()}")
    problem = Problem(x.shape[0], weight.shape[0], x.shape[1], dtype_name(x.dtype))
    return launch(problem, config, x, weight, None, 0.0, bias, residual, norm=False, out=residual)


def _add_linear_(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if bias is not None:
        residual.add_(bias)
    return residual.addmm_(x, weight.t())
