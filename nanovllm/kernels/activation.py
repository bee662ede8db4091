"""SwiGLU's elementwise half: silu(gate) * up on a packed [gate | up] row; also of rows that a norm should have scaled.

Cast order of `silu_mul` (Hugging Face's): silu in float32, rounded to x's dtype, then multiplied by up in that dtype.

`rms_silu_mul` takes y = x W, where x has not been normalised and gamma is folded into W, and does the rest of RMSNorm
on the way: 1 / rms(x) is one number a row, and here the row is read anyway (the consumer's side of CODA, arXiv
2605.19269). All in float32, one rounding. Against a norm in front of the GEMM that saves its launch and the write of
the normalised row: K elements a row read instead of K read and K written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nanovllm.kernels import reference
from nanovllm.kernels.jit import jit, num_sms, require_unit_stride, use_triton
from nanovllm.kernels.launch_config import RowConfig, cdiv, next_power_of_2, silu_mul_config

if TYPE_CHECKING:
    import triton.language as tl


@jit()
def _silu_mul_kernel(x, y, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program for BLOCK columns of a row. x: [rows, 2 * WIDTH] with row stride; y: [rows, WIDTH], contiguous.

    From the last row to the first: of a large x the L2 cache still holds what the GEMM wrote last. Nobody reads x
    again, so it makes way for y. With the GEMM, 2048 rows: 178.4 -> 174.3 us of 6144, 241.2 -> 236.6 of 8192; 8192 rows
    of 3072: 210.8 -> 206.5; up to 512 rows no difference (H100, Triton 3.6.0, 2026-11-26).
    """
    blocks = tl.cdiv(WIDTH, BLOCK)
    last_first = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (last_first // blocks).to(tl.int64)
    column = last_first % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(x + row * x_stride + column, mask=inside, other=0.0, eviction_policy="evict_first")
    up = tl.load(x + row * x_stride + WIDTH + column, mask=inside, other=0.0, eviction_policy="evict_first")
    wide = gate.to(tl.float32)
    tl.store(y + row * WIDTH + column, (wide * tl.sigmoid(wide)).to(gate.dtype) * up, mask=inside)


@jit()
def _rms_silu_mul_kernel(
    y, x, bias, out, y_stride, x_stride, span, eps,
    K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program for `span` columns of a row, a multiple of BLOCK. y: [rows, 2 * WIDTH] and x: [rows, K] with row
    strides; bias: [2 * WIDTH] or None; out: [rows, WIDTH], contiguous."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * span
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        value = tl.load(x + row * x_stride + place, mask=place < K, other=0.0).to(tl.float32)
        squares += value * value
    rstd = tl.rsqrt(tl.sum(squares) / K + eps)
    for start in range(first, tl.minimum(first + span, WIDTH), BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        gate = tl.load(y + row * y_stride + column, mask=inside, other=0.0).to(tl.float32) * rstd
        up = tl.load(y + row * y_stride + WIDTH + column, mask=inside, other=0.0).to(tl.float32) * rstd
        if bias is not None:
            gate += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
            up += tl.load(bias + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * WIDTH + column, gate * tl.sigmoid(gate) * up, mask=inside)


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
        _silu_mul_kernel[(count * cdiv(width, config.block),)](
            rows, y, rows.stride(0), WIDTH=width, BLOCK=config.block, num_warps=config.num_warps
        )
    return y


def rms_silu_mul(y: torch.Tensor, x: torch.Tensor, eps: float, bias: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up of [gate | up] = y / rms(x) + bias, where rms(x) = sqrt(mean(x^2) + eps).

    y: [..., 2I] and x: [..., K], the rows that y was made of, may be strided; bias: [2I]. All of one dtype.
    Returns [..., I], contiguous.
    In float16 y = x W may overflow where the norm would have made x smaller: not for that dtype.
    """
    if y.shape[-1] % 2 or y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"y must be [..., 2I] for the rows of x, got {tuple(y.shape)} and {tuple(x.shape)}")
    if not use_triton(y):
        return reference.rms_silu_mul(y, x, eps, bias)
    width = y.shape[-1] // 2
    products, rows = y.reshape(-1, 2 * width), x.reshape(-1, x.shape[-1])
    require_unit_stride(y=products, x=rows, bias=bias)
    out = torch.empty((*y.shape[:-1], width), dtype=y.dtype, device=y.device)
    count, k = rows.shape
    if count:
        block, block_k = min(next_power_of_2(width), 1024), min(next_power_of_2(k), 4096)
        span = block * _blocks_a_program(count, cdiv(width, block), num_sms(y.device))
        _rms_silu_mul_kernel[(count, cdiv(width, span))](
            products, rows, bias, out, products.stride(0), rows.stride(0), span, eps,
            K=k, WIDTH=width, BLOCK=block, BLOCK_K=block_k, num_warps=4,
        )  # fmt: skip
    return out


def _blocks_a_program(rows: int, blocks: int, sms: int) -> int:
    """As many of a row's blocks as leave each SM sixteen programs: each program sums the squares of x anew.

    To tune: sixteen programs of four warps are what an SM holds, and streams of fewer bytes each hide no latency.
    """
    return max(1, min(blocks, rows * blocks // (16 * sms)))
