"""Tokens that never left the device: what one step sampled becomes the input of the next.

The host prepares a step while the one before it runs, so it may know that a sequence has a next token but not which.
It then writes where the token will be: id -1 - r stands for row r of the tokens sampled last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nanovllm.kernels import reference
from nanovllm.kernels.jit import jit, use_triton
from nanovllm.kernels.launch_config import cdiv

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
