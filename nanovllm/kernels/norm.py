"""RMSNorm, alone and after a residual addition.

Formula: y = weight * (x / sqrt(mean(x^2) + eps)).
Cast order (Hugging Face's `LlamaRMSNorm`): the row is normalised in float32, rounded to x's dtype, then multiplied by
the weight in that dtype. The residual sum is rounded to x's dtype before its mean square is taken.
Traffic: one read and one write a tensor; a row lives in registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nanovllm.kernels import reference
from nanovllm.kernels.jit import jit, require_unit_stride, use_triton
from nanovllm.kernels.launch_config import RowConfig, rms_norm_config

if TYPE_CHECKING:
    import triton.language as tl


@jit()
def _rms_norm_kernel(
    x,
    residual,
    weight,
    y,
    new_residual,
    x_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    TRIGGER: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row. x: [rows, WIDTH] with row stride; weight: [WIDTH] or None; y, new_residual: contiguous."""
    if TRIGGER:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    if weight is not None:
        gamma = tl.load(weight + column, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    dtype = value.dtype
    value = value.to(tl.float32)
    if ADD:
        value += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(dtype)
        tl.store(new_residual + row * WIDTH + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(value * value) / WIDTH + eps)
    normed = (value * rstd).to(dtype)
    if weight is not None:
        normed = (normed * gamma).to(dtype)
    tl.store(y + row * WIDTH + column, normed, mask=inside)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    config: RowConfig | None = None,
    trigger: bool = False,
    pdl: bool = False,
) -> torch.Tensor:
    """RMSNorm over the last dimension.

    x: [..., K], any float dtype, rows may be strided; weight: [K], x's dtype, or None for ones. Returns [..., K],
    contiguous.
    trigger: let a dependent kernel behind this one start at once; pdl: be launched as a dependent oneself, with a
    weight that was in memory before the kernel in front started (both: Hopper and later).
    """
    if not use_triton(x):
        return reference.rms_norm(x, weight, eps)
    return _launch(x, None, weight, eps, config, trigger, pdl)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, config: RowConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(rms_norm(x + residual), x + residual)`; shapes and dtypes as in `rms_norm`, residual like x."""
    if not use_triton(x):
        return reference.add_rms_norm(x, residual, weight, eps)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"residual {residual.dtype} {tuple(residual.shape)} must match x {x.dtype} {tuple(x.shape)}")
    return _launch(x, residual, weight, eps, config)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    config: RowConfig | None,
    trigger: bool = False,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    width = x.shape[-1]
    if weight is not None and weight.shape != (width,):
        raise ValueError(f"weight must have shape ({width},) to match x, got {tuple(weight.shape)}")
    rows = x.reshape(-1, width)
    sums = residual.reshape(-1, width) if residual is not None else rows
    require_unit_stride(x=rows, residual=sums, weight=weight)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new_residual = torch.empty_like(y) if residual is not None else y
    count = rows.shape[0]
    if count:
        config = config or rms_norm_config(count, width)
        _rms_norm_kernel[(count,)](
            rows, sums, weight, y, new_residual, rows.stride(0), sums.stride(0), eps,
            WIDTH=width, BLOCK=config.block, ADD=residual is not None, TRIGGER=trigger, PDL=pdl,
            num_warps=config.num_warps, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return y, new_residual
