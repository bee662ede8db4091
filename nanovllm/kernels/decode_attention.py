"""Attention of one query token a sequence against its paged keys and values.

The scheme is Flash-Decoding's (Dao, Haziza, Massa and Sizov, 2023): the keys are split over programs, then merged.
Grid: (slot x KV head), one split of one sequence a slot. The query heads that share a KV head form the rows of one
matrix product, so each K and V element is read once. Which split a slot is, a plan on the device says (`split_plan`):
so the grid depends on host integers only, and one CUDA graph serves every mixture of lengths.
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
from nanovllm.kernels.jit import jit, require_unit_stride, use_triton
from nanovllm.kernels.kv_cache import check_cache, page_ids
from nanovllm.kernels.launch_config import DecodeConfig, decode_config, next_power_of_2
from nanovllm.kernels.split_plan import SplitPlan, first_key, plan_step, slot_keys, split_length

if TYPE_CHECKING:
    import triton.language as tl


@jit(
    do_not_specialize=("table_stride", "window", "min_split"),
    unaligned=("block_table", "context_lens"),
)
def _decode_kernel(
    q, k_cache, v_cache, block_table, context_lens, plan, out, partial, partial_lse,
    scale, q_stride, out_stride, table_stride, k_block_stride, v_block_stride, window, min_split,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """q, out: [B, KV_HEADS * GROUP, HEAD_DIM]; plan: [S, 4] or None; partial: [Hq, S, HEAD_DIM]; lse: [Hq, S]."""
    slot = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    sequence, begin, end, context = slot_keys(plan, context_lens, slot, window, min_split, SPLITS, HAS_WINDOW, BLOCK_N)
    if sequence < 0:
        return

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
    whole = True
    if plan is not None or SPLITS > 1:
        whole = (end == context) & (begin == first_key(context, window, HAS_WINDOW, BLOCK_N))
    if whole:
        tl.store(out + sequence.to(tl.int64) * out_stride + query_offset, acc, mask=inside)
    else:
        part = head.to(tl.int64) * (tl.num_programs(0) // KV_HEADS) + slot
        tl.store(partial + part[:, None] * HEAD_DIM + dim[None, :], acc, mask=inside)
        tl.store(partial_lse + part, top + tl.log2(total), mask=row < GROUP)


@jit()
def _merged(partial, partial_lse, rows, active, top, total, merged, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The state of a softmax over splits, [BLOCK_D] and two scalars, with those of `rows` [BLOCK_S] added."""
    dim = tl.arange(0, BLOCK_D)
    lse = tl.load(partial_lse + rows, mask=active, other=float("-inf"))
    inside = active[:, None] & (dim < HEAD_DIM)[None, :]
    value = tl.load(partial + rows[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)
    new_top = tl.maximum(top, tl.max(lse, axis=0))
    share = tl.exp2(lse - new_top)
    shrink = tl.exp2(top - new_top)
    return new_top, total * shrink + tl.sum(share, axis=0), merged * shrink + tl.sum(value * share[:, None], axis=0)


@jit(do_not_specialize=("slots", "window", "min_split"), unaligned=("context_lens",))
def _merge_kernel(
    partial, partial_lse, parts, context_lens, out, out_stride, slots, window, min_split,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (sequence, query head): weigh the splits' outputs by their share of the softmax's denominator.

    Few sequences have more than BLOCK_S splits: what those have beyond is added in a loop.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    if parts is not None:
        slot = tl.load(parts + 2 * sequence)
        splits = tl.load(parts + 2 * sequence + 1)
    else:  # of a lone sequence
        slot = sequence
        context = tl.load(context_lens)
        span = context - first_key(context, window, HAS_WINDOW, BLOCK_N)
        splits = tl.maximum(tl.cdiv(span, split_length(span, min_split, SPLITS, BLOCK_N)), 1)
    if PDL:  # also where there is nothing to merge: who waits for this kernel waits for the attention before it
        tl.extra.cuda.gdc_wait()
    if splits == 1:
        return
    split = tl.arange(0, BLOCK_S)
    rows = head.to(tl.int64) * slots + slot + split
    merged = tl.zeros((BLOCK_D,), tl.float32)
    top, total, merged = _merged(partial, partial_lse, rows, split < splits, -1.0e38, 0.0, merged, HEAD_DIM, BLOCK_D)
    if parts is not None:
        for start in range(BLOCK_S, splits, BLOCK_S):
            active = start + split < splits
            top, total, merged = _merged(
                partial, partial_lse, rows + start, active, top, total, merged, HEAD_DIM, BLOCK_D
            )
    dim = tl.arange(0, BLOCK_D)
    target = out + sequence.to(tl.int64) * out_stride + head * HEAD_DIM + dim
    tl.store(target, merged / total, mask=dim < HEAD_DIM)


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
    plan: SplitPlan | None = None,
) -> torch.Tensor:
    """Each sequence's one query token attends to the last `window` (None = all) of its `context_lens` keys.

    q: [B, Hq, D]; k_cache, v_cache: [num_blocks, Hkv, block_size, D]; block_table: [B, max_blocks] int32;
    context_lens: [B] int32, this token included; 0 marks a padding row, whose output is zeros.
    max_context_len: upper bound on context_lens known to the host (under a CUDA graph: for all replays); it only
    shapes the grid. None = what the block table can hold. plan: `plan_decode_attention` of the same, made here if None.
    Returns [B, Hq, D], in `out` if given.
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
    if plan is None:
        plan = plan_decode_attention(k_cache, context_lens, max_context_len or block_table.shape[1] * page, window)
    config, slots = plan.config, plan.config.slots(num_seqs)
    lse, partial = split_workspace(config, q, num_seqs, q_heads, dim)
    _decode_kernel[(slots * kv_heads,)](
        q, k_cache, v_cache, block_table, context_lens, plan.slots, out, partial, lse, scale * math.log2(math.e),
        q.stride(0), out.stride(0), block_table.stride(0), k_cache.stride(0), v_cache.stride(0), window or 0,
        config.min_split,
        KV_HEADS=kv_heads, GROUP=q_heads // kv_heads, HEAD_DIM=dim, PAGE=page,
        ROWS=max(16, next_power_of_2(q_heads // kv_heads)), BLOCK_D=next_power_of_2(dim), BLOCK_N=config.block_n,
        HAS_WINDOW=window is not None, SPLITS=plan.unshared, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    merge_splits(plan, partial, lse, context_lens, out, window)
    return out


def plan_decode_attention(
    k_cache: torch.Tensor, context_lens: torch.Tensor, max_context_len: int, window: int | None = None
) -> SplitPlan:
    """How a step's keys are split, for all layers of one shape and window."""
    return plan_step(decode_config, k_cache, context_lens, max_context_len, window)


def split_workspace(
    config: DecodeConfig, q: torch.Tensor, num_seqs: int, q_heads: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 log-sum-exp [Hq, S] and outputs [Hq, S, D] of the splits, on q's device; empty where there are none."""
    slots = config.slots(num_seqs)
    rows = slots if slots > num_seqs else 0
    lse = q.new_empty((q_heads, rows), dtype=torch.float32)
    return lse, q.new_empty((q_heads, rows, dim), dtype=torch.float32)


def merge_splits(
    plan: SplitPlan,
    partial: torch.Tensor,
    lse: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    window: int | None,
    pdl: bool = False,
) -> None:
    """Weigh the outputs of splits, partial [Hq, S, D] and lse [Hq, S] (float32), into out [B, Hq, D].

    Sequences of one split are left alone: their result is in `out`. pdl: be launched as a dependent.
    """
    num_seqs, q_heads, dim = out.shape
    config = plan.config
    if config.slots(num_seqs) == num_seqs:
        return
    _merge_kernel[(num_seqs, q_heads)](
        partial, lse, plan.parts, context_lens, out, out.stride(0), lse.shape[1], window or 0, config.min_split,
        HEAD_DIM=dim, BLOCK_D=next_power_of_2(dim), SPLITS=plan.unshared,
        BLOCK_S=max(2, next_power_of_2(config.splits)), BLOCK_N=config.block_n, HAS_WINDOW=window is not None,
        PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
