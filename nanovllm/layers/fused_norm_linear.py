"""The decode chain's two linear forms, as functions of the layers that own the weights.

A decoder layer of a step of few rows is `norm_linear` (RMSNorm + QKV), rope and attention, `linear_residual_` (output
projection), `norm_linear` (RMSNorm + gate, up and SwiGLU) and `linear_residual_` (down): five kernels, and one more
where attention has splits to merge. Above 16 rows each `norm_linear` is two kernels, a norm and a tile or a GEMM
(`chain_config`). The residual stream is the only thing that goes from layer to layer. Which steps take this way is the
runner's decision; `why_not_fused` says where it cannot be taken at all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanovllm.kernels import native, reference
from nanovllm.kernels.activation import silu_mul
from nanovllm.kernels.chain_config import linear_config
from nanovllm.kernels.fusion_config import UNFUSED, Problem
from nanovllm.kernels.jit import gpu_of, interpreting, triton_installed, use_triton
from nanovllm.kernels.linear_residual import linear_residual
from nanovllm.kernels.rms_norm_linear_fusion import dtype_name, launch
from nanovllm.layers.attention.backend import AttentionSpec
from nanovllm.layers.attention.triton_paged import TritonBackend
from nanovllm.layers.embedding import VocabParallelEmbedding
from nanovllm.layers.linear import LinearBase, RowParallelLinear
from nanovllm.layers.norm import RMSNorm
from nanovllm.utils import nvtx


@nvtx.ranged(2)
def norm_linear(
    x: torch.Tensor, norm: RMSNorm, linear: LinearBase | VocabParallelEmbedding, *, swiglu: bool = False
) -> torch.Tensor:
    """x [B, K] -> linear(norm(x)) [B, N]; with `swiglu`, the weight is packed [2 N, K], gate rows first."""
    weight, bias = linear.weight, linear.bias
    if native.runs(x):
        return native.linear(x, weight, bias, norm_weight=norm.weight, eps=norm.eps, swiglu=swiglu)
    if not use_triton(x):
        return reference.rms_norm_linear(x, weight, norm.weight, norm.eps, bias, None, "swiglu" if swiglu else None)
    problem = _problem(x, weight, swiglu)
    config = linear_config(problem, gpu_of(x.device))
    if config.variant == "unfused":
        y = F.linear(norm(x), weight, bias)
        return silu_mul(y) if swiglu else y
    return launch(problem, config, x, weight, norm.weight, norm.eps, bias, None)


@nvtx.ranged(1)
def linear_residual_(x: torch.Tensor, linear: RowParallelLinear, residual: torch.Tensor) -> torch.Tensor:
    """residual [B, N] += linear(x [B, K]), in place; returns it."""
    if native.runs(x):
        return native.linear_residual_(x, linear.weight, linear.bias, residual)
    config = UNFUSED
    if use_triton(x):
        config = linear_config(_problem(x, linear.weight, False), gpu_of(x.device), norm=False)
    return linear_residual(x, linear.weight, residual, bias=linear.bias, config=config)


def _problem(x: torch.Tensor, weight: torch.Tensor, swiglu: bool) -> Problem:
    rows, width = weight.shape
    return Problem(x.shape[0], rows // 2 if swiglu else rows, width, dtype_name(x.dtype), swiglu)


def why_not_fused(spec: AttentionSpec, backend: str, world_size: int) -> list[str]:
    """Reasons why the decode chain cannot run here; [] means that it can. `backend`: the attention backend in use."""
    if spec.device.type == "cpu" and not interpreting():
        return _why_not_native(spec, world_size)
    reasons = [] if triton_installed() else ["the package triton is not installed (pip install triton)"]
    if backend != "triton":
        reasons.append(f"it brings its own attention, but attention_backend={backend!r} was asked for")
    if world_size > 1:
        reasons.append(f"its kernels do not meet other ranks, and tensor_parallel_size is {world_size}")
    return reasons + TritonBackend.why_not(spec)


def _why_not_native(spec: AttentionSpec, world_size: int) -> list[str]:
    """The same for the chain in C."""
    reasons = []
    if spec.dtype != torch.float32:
        reasons.append(f"on a CPU its kernels compute in float32, the engine in {dtype_name(spec.dtype)}")
    if world_size > 1:
        reasons.append(f"its kernels do not meet other ranks, and tensor_parallel_size is {world_size}")
    return reasons + native.why_not_heads(spec.num_heads, spec.num_kv_heads, spec.head_dim)
