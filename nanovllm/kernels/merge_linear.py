"""Merge the splits of a lone sequence's attention and multiply by the output projection, in one kernel.

`rope_attention` leaves one output and one log-sum-exp for each split of the keys. Weighing them needs no more than the
projection's own read of its input, which becomes, for head h and split s,

    x[h] = sum_s 2^(lse[h, s] - top[h]) partial[h, s] / sum_s 2^(lse[h, s] - top[h])
    y = W x + bias + residual

so the kernel that would only merge, 1.2 us of latency a layer, disappears. Worth it while the splits are few: every
program reads all of them.

Grid: (N / BLOCK_N,). Each warp multiplies its slice of K for all BLOCK_N rows of the weight, which are asked for before
the wait; the slices are summed once, at the end. Cast order: merged in float32, rounded once to the weight's dtype as
the merge kernel does; products and sums in float32, one rounding of the result.
Traffic: the weight once; 4 (D + 1) bytes a head and split, by every program, from the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nanovllm.kernels.decode_attention import _first_key, _split_length
from nanovllm.kernels.jit import gpu_of, jit, require_unit_stride
from nanovllm.kernels.launch_config import DecodeConfig, cdiv, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl

MAX_MERGED_SPLITS = 4  # H100, Qwen3-0.6B: 8 KB a split and program


@dataclass(frozen=True, slots=True)
class SplitOutput:
    """What attention leaves of one sequence before its splits are merged."""

    partial: torch.Tensor  # float32 [1, Hq, max_splits, D], of active splits
    lse: torch.Tensor  # float32 [1, Hq, max_splits], base 2
    context_lens: torch.Tensor  # int32 [1]
    window: int | None
    config: DecodeConfig  # the splits were made with


@jit(do_not_specialize=("N", "window", "min_split"), unaligned=("context_lens",))
def _merge_linear_kernel(
    partial, partial_lse, context_lens, weight, bias, residual, y, N, weight_stride, window, min_split,
    K: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr,
    TILE: tl.constexpr, HAS_WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partial: float32 [K / HEAD_DIM, SPLITS, HEAD_DIM]; TILE: keys of attention's tile; y and residual: [N]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    WIDTH: tl.constexpr = WARPS * 256
    CHUNKS: tl.constexpr = (K + WIDTH - 1) // WIDTH
    # A lane has eight neighbouring columns, which belong to one head. [32, WARPS] of the first of them, and all as the
    # weight has them: [WARPS, 1, 256]. (Lanes come first where Triton is to deal them out first.)
    lane_column = tl.arange(0, 32)[:, None] * 8 + tl.arange(0, WARPS)[None, :] * 256
    eight = tl.arange(0, 2)[None, None, :, None] * 4 + tl.arange(0, 4)[None, None, None, :]
    column = tl.arange(0, WARPS)[:, None, None] * 256 + tl.arange(0, 256)[None, None, :]
    row = tl.minimum(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
    tile = weight + row[None, :, None] * weight_stride + column
    chunks = ()
    for i in tl.static_range(CHUNKS):
        inside = i * WIDTH + column < K
        chunk = tl.load(tile + i * WIDTH, mask=inside, other=0.0, eviction_policy="evict_first")
        chunks = chunks + (chunk,)  # type: ignore[assignment]
    context = tl.load(context_lens)
    span = context - _first_key(context, window, HAS_WINDOW, TILE)
    length = _split_length(span, SPLITS, min_split, TILE)
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if PDL:
        tl.extra.cuda.gdc_wait()

    stream = tl.load(residual + output, mask=output < N, other=0.0)
    scores, values = (), ()
    for j in tl.static_range(CHUNKS * SPLITS):
        start, split = (j // SPLITS) * WIDTH, j % SPLITS
        active = span >= 0 if split == 0 else split * length < span  # the first also of an empty sequence: it is zeros
        head = (start + lane_column) // HEAD_DIM
        inside = active & (start + lane_column < K)
        score = tl.load(partial_lse + head * SPLITS + split, mask=inside, other=-1.0e38)
        place = head * (SPLITS * HEAD_DIM) + split * HEAD_DIM + (start + lane_column) % HEAD_DIM
        pointer = partial + place[:, :, None, None] + eight
        value = tl.load(pointer, mask=inside[:, :, None, None], other=0.0)
        scores = scores + (score,)  # type: ignore[assignment]
        values = values + (value,)  # type: ignore[assignment]
    products = tl.zeros((WARPS, BLOCK_N, 256), tl.float32)
    for i in tl.static_range(CHUNKS):
        top = scores[i * SPLITS]  # type: ignore[var-annotated]
        for s in tl.static_range(1, SPLITS):
            top = tl.maximum(top, scores[i * SPLITS + s])
        total = tl.zeros((32, WARPS), tl.float32)
        merged = tl.zeros((32, WARPS, 2, 4), tl.float32)
        for s in tl.static_range(SPLITS):
            share = tl.exp2(scores[i * SPLITS + s] - top)
            total += share
            merged += values[i * SPLITS + s] * share[:, :, None, None]
        merged = (merged / total[:, :, None, None]).to(weight.dtype.element_ty).to(tl.float32)
        merged = tl.reshape(tl.permute(merged, (1, 0, 2, 3)), (WARPS, 1, 256))
        products += chunks[i].to(tl.float32) * merged
    result = tl.sum(tl.sum(products, axis=2), axis=0)
    if bias is not None:
        result += tl.load(bias + row).to(tl.float32)
    result += stream.to(tl.float32)
    tl.store(y + output, result.to(y.dtype.element_ty), mask=output < N)


def why_not_merged(num_seqs: int, config: DecodeConfig, head_dim: int, element_size: int) -> list[str]:
    """Reasons why attention's splits must be merged by a kernel of their own; [] means that this one can."""
    reasons = [] if num_seqs == 1 else [f"{num_seqs} sequences, not one"]
    if not 1 < config.max_splits <= MAX_MERGED_SPLITS or config.max_splits & (config.max_splits - 1):
        reasons.append(f"{config.max_splits} splits, not 2 or 4")
    if head_dim % 8:
        reasons.append(f"heads of {head_dim} elements: a lane reads 8 of one head")
    if element_size != 2:
        reasons.append("eight columns a lane are what 16-bit weights have")
    return reasons


def merge_linear_(
    splits: SplitOutput,
    weight: torch.Tensor,
    residual: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    pdl: bool | None = None,
) -> torch.Tensor:
    """residual [1, N] += weight [N, Hq * D] merged(splits) + bias [N], in place; returns it.

    weight, residual and bias share a 16-bit dtype. pdl: as in `rope_attention`.
    """
    require_unit_stride(weight=weight, residual=residual, bias=bias)
    rows, width = weight.shape
    _, heads, num_splits, dim = splits.partial.shape
    if residual.shape != (1, rows) or width != heads * dim:
        raise ValueError(
            f"residual {tuple(residual.shape)} and splits of {heads} heads of {dim} do not match a weight "
            f"{tuple(weight.shape)}"
        )
    gpu = gpu_of(weight.device)
    pdl = gpu.pdl if pdl is None else pdl
    num_warps = min(8, next_power_of_2(cdiv(width, 256)))
    block_n = 8 if cdiv(rows, 8) >= gpu.num_sms * 3 // 4 else 4
    _merge_linear_kernel[(cdiv(rows, block_n),)](
        splits.partial, splits.lse, splits.context_lens, weight, bias, residual, residual, rows, weight.stride(0),
        splits.window or 0, splits.config.min_split, K=width, HEAD_DIM=dim, SPLITS=num_splits, BLOCK_N=block_n,
        WARPS=num_warps, TILE=splits.config.block_n, HAS_WINDOW=splits.window is not None, PDL=pdl,
        num_warps=num_warps, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return residual
