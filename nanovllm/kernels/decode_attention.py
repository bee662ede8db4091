"""Attention of one query token a sequence against its paged keys and values.

The scheme is Flash-Decoding's (Dao, Haziza, Massa and Sizov, 2023): the keys are split over programs, then merged.
Grid: (sequence x KV head, split). The query heads that share a KV head form the rows of one matrix product, so each
K and V element is read once. A sequence's keys are cut into splits whose number every program derives from
`context_lens` on the device: the grid depends on host integers only, and one CUDA graph serves every context length.
A sequence of one split writes its result at once; otherwise splits leave (output, log-sum-exp) in a workspace and a
second kernel merges them in a fixed order, so results reproduce.
Traffic: 2 * context * Hkv * D elements a sequence, plus the workspace, which `min_split` keeps small.
Softmax runs in base 2 (scale times log2 e is folded into the scores), in float32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from nanovllm.kernels import reference
from nanovllm.kernels.jit import gpu_of, jit, require_unit_stride, use_triton
from nanovllm.kernels.kv_cache import check_cache, page_ids
from nanovllm.kernels.launch_config import DecodeConfig, decode_config, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl


@jit()
def _split_length(span, max_splits, min_split, BLOCK_N: tl.constexpr):
    """Keys per split: at least min_split, a multiple of BLOCK_N, few enough splits."""
    return tl.cdiv(tl.maximum(tl.cdiv(span, max_splits), min_split), BLOCK_N) * BLOCK_N


@jit()
def _first_key(context, window, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the first tile starts: 0, or the tile that holds the oldest visible key."""
    if HAS_WINDOW:
        return tl.maximum(context - window, 0) // BLOCK_N * BLOCK_N
    return 0


@jit(
    do_not_specialize=("table_stride", "window", "max_splits", "min_split"),
    unaligned=("block_table", "context_lens"),
)
def _decode_kernel(
    q, k_cache, v_cache, block_table, context_lens, out, partial, partial_lse,
    scale, q_stride, out_stride, table_stride, k_block_stride, v_block_stride, window, max_splits, min_split,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """q, out: [B, KV_HEADS * GROUP, HEAD_DIM]; partial: [B, Hq, max_splits, HEAD_DIM]; partial_lse without the last."""
    sequence = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    context = tl.load(context_lens + sequence)
    first = _first_key(context, window, HAS_WINDOW, BLOCK_N)
    length = _split_length(context - first, max_splits, min_split, BLOCK_N)
    begin = first + split * length
    if (begin >= context) & (split > 0):
        return
    end = tl.minimum(begin + length, context)

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + row
    inside = (row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    query_offset = head[:, None] * HEAD_DIM + dim[None, :]
    query = tl.load(q + sequence.to(tl.int64) * q_stride + query_offset, mask=inside, other=0.0)
    table = block_table + sequence.to(tl.int64) * table_stride
    page_base = kv_head * (PAGE * HEAD_DIM)

    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    top = tl.full((ROWS,), -1.0e38, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    page = page_ids(table, begin, end, PAGE, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        visible = key < end
        if HAS_WINDOW:
            visible = visible & (key >= context - window)
        inner = page_base + (key % PAGE) * HEAD_DIM
        load = visible[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_cache + (page * k_block_stride + inner)[:, None] + dim[None, :], mask=load, other=0.0)
        v = tl.load(v_cache + (page * v_block_stride + inner)[:, None] + dim[None, :], mask=load, other=0.0)
        page = page_ids(table, start + BLOCK_N, end, PAGE, BLOCK_N)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(visible[None, :], scores, -1.0e38)
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]  # context 0 (a padding row): zeros
    if (SPLIT == 0) | (context - first <= length):
        tl.store(out + sequence.to(tl.int64) * out_stride + query_offset, acc, mask=inside)
    else:
        slot = (sequence.to(tl.int64) * (KV_HEADS * GROUP) + head) * max_splits + split
        tl.store(partial + slot[:, None] * HEAD_DIM + dim[None, :], acc, mask=inside)
        tl.store(partial_lse + slot, top + tl.log2(total), mask=row < GROUP)


@jit(do_not_specialize=("window", "max_splits", "min_split"), unaligned=("context_lens",))
def _merge_kernel(
    partial, partial_lse, context_lens, out, out_stride, window, max_splits, min_split,
    Q_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (sequence, query head): weigh the splits' outputs by their share of the softmax's denominator."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    context = tl.load(context_lens + sequence)
    span = context - _first_key(context, window, HAS_WINDOW, BLOCK_N)
    length = _split_length(span, max_splits, min_split, BLOCK_N)
    if PDL:  # also where there is nothing to merge: who waits for this kernel waits for the attention before it
        tl.extra.cuda.gdc_wait()
    if span <= length:
        return
    split = tl.arange(0, BLOCK_S)
    dim = tl.arange(0, BLOCK_D)
    active = split * length < span
    row = (sequence.to(tl.int64) * Q_HEADS + head) * max_splits + split
    lse = tl.load(partial_lse + row, mask=active, other=float("-inf"))
    inside = active[:, None] & (dim < HEAD_DIM)[None, :]
    value = tl.load(partial + row[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)
    share = tl.exp2(lse - tl.max(lse, axis=0))
    merged = tl.sum(value * share[:, None], axis=0) / tl.sum(share, axis=0)
    target = out + sequence.to(tl.int64) * out_stride + head * HEAD_DIM + dim
    tl.store(target, merged, mask=dim < HEAD_DIM)


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int | None = None,
    max_context_len: int | None = None,
    out: torch.Tensor | None = None,
    *,
    config: DecodeConfig | None = None,
) -> torch.Tensor:
    """Each sequence's one query token attends to the last `window` (None = all) of its `context_lens` keys.

    q: [B, Hq, D]; k_cache, v_cache: [num_blocks, Hkv, block_size, D]; block_table: [B, max_blocks] int32;
    context_lens: [B] int32, this token included; 0 marks a padding row, whose output is zeros.
    max_context_len: upper bound on context_lens known to the host (under a CUDA graph: for all replays); it only
    shapes the grid. None = what the block table can hold. Returns [B, Hq, D], in `out` if given.
    """
    if not use_triton(q):
        result = reference.decode_attention(q, k_cache, v_cache, block_table, context_lens, scale, window)
        return result if out is None else out.copy_(result)
    check_cache(k_cache, v_cache)
    require_unit_stride(block_table=block_table, context_lens=context_lens)
    num_seqs, q_heads, dim = q.shape
    _, kv_heads, page, _ = k_cache.shape
    out = torch.empty_like(q) if out is None else out
    if q.stride()[1:] != (dim, 1) or out.stride()[1:] != (dim, 1):
        raise ValueError(f"q and out must be contiguous within a token, got strides {q.stride()} and {out.stride()}")
    if not num_seqs:
        return out
    longest = max_context_len or block_table.shape[1] * page
    if window is not None:
        longest = min(longest, window + page)
    config = config or decode_config(num_seqs, kv_heads, dim, q.element_size(), longest, gpu_of(q.device))
    splits = config.max_splits
    workspace = (num_seqs, q_heads, splits) if splits > 1 else (0,)
    lse = torch.empty(workspace, dtype=torch.float32, device=q.device)
    partial = torch.empty((*workspace, dim), dtype=torch.float32, device=q.device)
    _decode_kernel[(num_seqs * kv_heads, splits)](
        q, k_cache, v_cache, block_table, context_lens, out, partial, lse, scale * math.log2(math.e),
        q.stride(0), out.stride(0), block_table.stride(0), k_cache.stride(0), v_cache.stride(0),
        window or 0, splits, config.min_split,
        KV_HEADS=kv_heads, GROUP=q_heads // kv_heads, HEAD_DIM=dim, PAGE=page,
        ROWS=max(16, next_power_of_2(q_heads // kv_heads)), BLOCK_D=next_power_of_2(dim), BLOCK_N=config.block_n,
        HAS_WINDOW=window is not None, SPLIT=splits > 1, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        merge_splits(partial, lse, context_lens, out, window, config)
    return out


def merge_splits(
    partial: torch.Tensor,
    lse: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    window: int | None,
    config: DecodeConfig,
    pdl: bool = False,
) -> None:
    """Weigh the outputs of splits, partial [B, Hq, splits, D] and lse [B, Hq, splits] (float32), into out [B, Hq, D].

    `config` is what the splits were made with. Sequences of one split are left alone: their result is in `out`.
    """
    num_seqs, q_heads, splits, dim = partial.shape
    _merge_kernel[(num_seqs, q_heads)](
        partial, lse, context_lens, out, out.stride(0), window or 0, splits, config.min_split,
        Q_HEADS=q_heads, HEAD_DIM=dim, BLOCK_D=next_power_of_2(dim), BLOCK_S=next_power_of_2(splits),
        BLOCK_N=config.block_n, HAS_WINDOW=window is not None, PDL=pdl, num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
