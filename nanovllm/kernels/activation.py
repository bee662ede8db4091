"""SwiGLU's elementwise half: silu(gate) * up on a packed [gate | up] row.

Cast order (Hugging Face's): silu in float32, rounded to x's dtype, then multiplied by up in that dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nanovllm.kernels import reference
from nanovllm.kernels.jit import jit, require_unit_stride, use_triton
from nanovllm.kernels.launch_config import RowConfig, cdiv, silu_mul_config

if TYPE_CHECKING:
    import triton.language as tl


@jit()
def _silu_mul_kernel(x, y, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program for BLOCK columns of a row. x: [rows, 2 * WIDTH] with row stride; y: [rows, WIDTH], contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    up = tl.load(x + row * x_stride + WIDTH + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    tl.store(y + row * WIDTH + column, (wide * tl.sigmoid(wide)).to(gate.dtype) * up, mask=inside)


def silu_mul(x: torch.Tensor, *, config: RowConfig | None = None) -> torch.Tensor:
    """x: [..., 2I] (gate first, then up), rows may be strided. Returns [..., I], contiguous."""
    if x.shape[-1] % 2:
        raise ValueError(f"silu_mul needs an even last dimension (gate and up), got {x.shape[-1]}")
    if not use_triton(x):
        return reference.silu_mul(x)
    width = x.shape[-1] // 2
    rows = x.reshape(-1, 2 * width)
    require_unit_stride(x=rows)
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    count = rows.shape[0]
    if count:
        config = config or silu_mul_config(count, width)
        _silu_mul_kernel[(count, cdiv(width, config.block))](
            rows, y, rows.stride(0), WIDTH=width, BLOCK=config.block, num_warps=config.num_warps
        )
    return y
