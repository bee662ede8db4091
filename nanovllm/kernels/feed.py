"""Tokens that never left the device: what one step sampled becomes the input of the next.

The host prepares a step while the one before it runs, so it may know that a sequence has a next token but not which.
It then writes where the token will be: id -1 - r stands for row r of the tokens sampled last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nanovllm.kernels import reference
from nanovllm.kernels.jit import gpu_of, jit, require_unit_stride, use_triton
from nanovllm.kernels.launch_config import cdiv, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl


@jit(do_not_specialize=("count",), unaligned=("ids",))
def _feed_kernel(ids, sampled, count, BLOCK: tl.constexpr):
    """ids: int64 [count]; sampled: int64, long enough for every row that is named."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + index, mask=index < count, other=0)
    known = tl.load(sampled - 1 - token, mask=token < 0, other=0)
    tl.store(ids + index, known, mask=token < 0)


def feed_tokens_(ids: torch.Tensor, sampled: torch.Tensor) -> None:
    """ids [T] int64, in place: every id -1 - r becomes sampled[r]. sampled: [R] int64."""
    if not (ids.is_cuda and use_triton(ids)):
        reference.feed_tokens_(ids, sampled)
    elif ids.numel():
        _feed_kernel[(cdiv(ids.numel(), 1024),)](ids, sampled, ids.numel(), BLOCK=1024, num_warps=4)


@jit(unaligned=("ids",))
def _embed_kernel(ids, sampled, table, x, table_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program (row, block of columns). ids: int64 [T]; table: [vocab, WIDTH] with row stride; x: [T, WIDTH]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids + row)
    if token < 0:
        token = tl.load(sampled - 1 - token)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(table + token * table_stride + column, mask=column < WIDTH)
    tl.store(x + row * WIDTH + column, value, mask=column < WIDTH)


def embed_fed(ids: torch.Tensor, sampled: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows of table [vocab, width] at the tokens that ids [T] int64 stand for, as in `feed_tokens_`: [T, width].

    One kernel where feeding and looking up are two. The kernel behind it may be a programmatic dependent.
    """
    if not use_triton(table):
        return reference.embed_fed(ids, sampled, table)
    require_unit_stride(ids=ids, sampled=sampled, table=table)
    count, width = ids.shape[0], table.shape[1]
    x = torch.empty(count, width, dtype=table.dtype, device=table.device)
    if count:
        block = min(1024, next_power_of_2(width))
        _embed_kernel[(count, cdiv(width, block))](
            ids, sampled, table, x, table.stride(0), WIDTH=width, BLOCK=block, PDL=gpu_of(table.device).pdl,
            num_warps=4,
        )  # fmt: skip
    return x
