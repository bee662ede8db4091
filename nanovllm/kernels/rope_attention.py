"""A decode step between the QKV projection and the output projection, in one kernel, or two where keys are split.

Per sequence and KV head: optional RMSNorm of the query and key heads (Qwen3), rotary embedding, append of the new key
and value to the paged cache, attention of the one query token to all keys. Unfused these are `rope` and
`decode_attention`, three launches with the merge; at batch 1 their latency is as long as that of the linear layers.

Grid: (slot x KV head), keys split and slots shared out as in `decode_attention` (Flash-Decoding). The program of the
last split owns the new token: it writes the new key and value to the cache and attends to them from its registers, so
no program reads what another one of this launch writes. Where there are more slots than sequences, a second kernel
merges splits, in their order, so results reproduce. (Merged by the last program to arrive, a layer took 3.8 us longer
than with one split: H100, Qwen3-0.6B, one sequence. A dependent kernel's edge is 0.6.)
Cast order: that of `rope` and `decode_attention`: query and key are rounded to the cache's dtype after the rotation.
Traffic: that of `decode_attention`.

With PDL a program loads its first old keys and values while the projection before it still runs: they are from earlier
steps, like everything that it reads before its wait. Few keys are a matter of latency: the first tile waits in
registers. Many are a matter of bandwidth: with two stages or more the compiler keeps tiles on their way into shared
memory. It puts the first copies in front of the loop, so the wait stands inside, in the loop's first turn.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from nanovllm.kernels import reference
from nanovllm.kernels.decode_attention import merge_splits, split_workspace
from nanovllm.kernels.jit import gpu_of, jit, require_unit_stride, use_triton
from nanovllm.kernels.kv_cache import check_cache, page_ids
from nanovllm.kernels.launch_config import next_power_of_2, rope_attention_config
from nanovllm.kernels.split_plan import SplitPlan, first_key, plan_step, slot_keys

if TYPE_CHECKING:
    import triton.language as tl


@jit()
def _rotated(x, other, weight, other_weight, cos, sin, eps, NORM: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Normalise (optional) and rotate heads [HEADS, BLOCK_D], in their own dtype.

    Element d turns with its partner half a head away: `other` holds the partners, and sin has the sign they turn with.
    """
    dtype = x.dtype
    x = x.to(tl.float32)
    other = other.to(tl.float32)
    if NORM:
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
        x = ((x * rstd).to(dtype) * weight).to(tl.float32)
        other = ((other * rstd).to(dtype) * other_weight).to(tl.float32)
    return (x * cos + other * sin).to(dtype)


@jit()
def _load_tile(
    k_cache, v_cache, page, start, end, oldest, kv_head, k_block_stride, v_block_stride,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Keys and values [BLOCK_N, BLOCK_D] of positions start.. below end, and which of them are visible."""
    key = start + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    visible = key < end
    if HAS_WINDOW:
        visible = visible & (key >= oldest)
    inner = kv_head * (PAGE * HEAD_DIM) + (key % PAGE) * HEAD_DIM
    inside = visible[:, None] & (dim < HEAD_DIM)[None, :]
    k = tl.load(k_cache + (page * k_block_stride + inner)[:, None] + dim[None, :], mask=inside, other=0.0)
    v = tl.load(v_cache + (page * v_block_stride + inner)[:, None] + dim[None, :], mask=inside, other=0.0)
    return k, v, visible


@jit()
def _attend(q, k, v, visible, scale, top, total, acc):
    """One tile of the online softmax, base 2."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(visible[None, :], scores, -1.0e38)
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_top, total, acc


@jit()
def _new_token(
    token, k_slot, v_slot, cos, sin, q_scale, q_other_scale, k_scale, k_other_scale, scale, eps, owns_new, kv_head,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Wait for the projection; rotate the queries, and the key, which the split that `owns_new` stores with its value.

    Returns the queries [ROWS, BLOCK_D] and the state of a softmax that has seen the new key, if owned, and no other.
    """
    row = tl.arange(0, ROWS)[:, None]
    dim = tl.arange(0, BLOCK_D)
    columns = dim[None, :]
    partner = tl.where(columns < HEAD_DIM // 2, columns + HEAD_DIM // 2, columns - HEAD_DIM // 2)
    in_head = columns < HEAD_DIM
    query = token + (kv_head * GROUP + row) * HEAD_DIM
    new_key = token + (KV_HEADS * GROUP + kv_head) * HEAD_DIM
    if PDL:
        tl.extra.cuda.gdc_wait()
    # All loads first: a reduction is a barrier.
    q = tl.load(query + columns, mask=(row < GROUP) & in_head, other=0.0)
    q_other = tl.load(query + partner, mask=(row < GROUP) & in_head, other=0.0)
    new_k = tl.load(new_key + columns, mask=in_head, other=0.0)
    k_other = tl.load(new_key + partner, mask=in_head, other=0.0)
    new_v = tl.load(new_key + KV_HEADS * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
    q = _rotated(q, q_other, q_scale, q_other_scale, cos, sin, eps, NORM, HEAD_DIM)
    new_k = _rotated(new_k, k_other, k_scale, k_other_scale, cos, sin, eps, NORM, HEAD_DIM)
    if owns_new:
        tl.store(k_slot + columns, new_k, mask=in_head)
        tl.store(v_slot + dim, new_v, mask=dim < HEAD_DIM)
    score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), axis=1) * scale
    top = tl.where(owns_new, score, -1.0e38)
    total = tl.zeros((ROWS,), tl.float32) + tl.where(owns_new, 1.0, 0.0)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32) + tl.where(owns_new, new_v.to(tl.float32), 0.0)[None, :]
    return q, top, total, acc


@jit(
    do_not_specialize=("table_stride", "window", "min_split"),
    unaligned=("block_table", "context_lens"),
)
def _rope_attention_kernel(
    qkv, q_weight, k_weight, cos_sin, k_cache, v_cache, block_table, context_lens, plan, out, partial, partial_lse,
    scale, eps, qkv_stride, table_stride, k_block_stride, v_block_stride, window, min_split,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, NORM: tl.constexpr,
    HAS_WINDOW: tl.constexpr, SPLITS: tl.constexpr, PIPELINED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """qkv: [B, (KV_HEADS * GROUP + 2 KV_HEADS) * HEAD_DIM]; out: [B, KV_HEADS * GROUP, HEAD_DIM], contiguous;
    plan: [S, 4] or None; partial: [Hq, S, HEAD_DIM] and partial_lse without the last, float32."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    sequence, begin, end, context = slot_keys(plan, context_lens, slot, window, min_split, SPLITS, HAS_WINDOW, BLOCK_N)
    if sequence < 0:
        return
    owns_new = (end == context) & (context > 0)
    old_end = tl.minimum(end, context - 1)
    position = tl.maximum(context - 1, 0)

    # Before the wait: what earlier steps left.
    table = block_table + sequence.to(tl.int64) * table_stride
    page = page_ids(table, begin, old_end, PAGE, BLOCK_N)
    if not PIPELINED:
        k, v, visible = _load_tile(
            k_cache, v_cache, page, begin, old_end, context - window, kv_head, k_block_stride, v_block_stride,
            HEAD_DIM, PAGE, BLOCK_D, BLOCK_N, HAS_WINDOW,
        )  # fmt: skip
    dim = tl.arange(0, BLOCK_D)
    HALF: tl.constexpr = HEAD_DIM // 2
    angle = cos_sin + position.to(tl.int64) * HEAD_DIM + tl.where(dim < HALF, dim, dim - HALF)
    cos = tl.load(angle, mask=dim < HEAD_DIM, other=0.0)[None, :]
    sin = (tl.load(angle + HALF, mask=dim < HEAD_DIM, other=0.0) * tl.where(dim < HALF, -1.0, 1.0))[None, :]
    new_page = tl.load(table + position // PAGE).to(tl.int64)
    columns = dim[None, :]
    partner = tl.where(columns < HALF, columns + HALF, columns - HALF)
    q_scale, q_other_scale, k_scale, k_other_scale = cos, cos, cos, cos  # replaced below, or unused
    if NORM:
        in_head = columns < HEAD_DIM
        q_scale = tl.load(q_weight + columns, mask=in_head, other=0.0)
        q_other_scale = tl.load(q_weight + partner, mask=in_head, other=0.0)
        k_scale = tl.load(k_weight + columns, mask=in_head, other=0.0)
        k_other_scale = tl.load(k_weight + partner, mask=in_head, other=0.0)
    token = qkv + sequence.to(tl.int64) * qkv_stride
    place = kv_head * (PAGE * HEAD_DIM) + (position % PAGE) * HEAD_DIM
    new_k_slot, new_v_slot = k_cache + new_page * k_block_stride + place, v_cache + new_page * v_block_stride + place

    if PIPELINED:
        q = tl.zeros((ROWS, BLOCK_D), qkv.dtype.element_ty)
        top = tl.zeros((ROWS,), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for start in range(begin, tl.maximum(old_end, begin + 1), BLOCK_N):
            k, v, visible = _load_tile(
                k_cache, v_cache, page, start, old_end, context - window, kv_head, k_block_stride, v_block_stride,
                HEAD_DIM, PAGE, BLOCK_D, BLOCK_N, HAS_WINDOW,
            )  # fmt: skip
            page = page_ids(table, start + BLOCK_N, old_end, PAGE, BLOCK_N)
            if start == begin:
                q, top, total, acc = _new_token(
                    token, new_k_slot, new_v_slot, cos, sin, q_scale, q_other_scale, k_scale, k_other_scale, scale, eps,
                    owns_new, kv_head, KV_HEADS, GROUP, HEAD_DIM, ROWS, BLOCK_D, NORM, PDL,
                )  # fmt: skip
            top, total, acc = _attend(q, k, v, visible, scale, top, total, acc)
    else:
        q, top, total, acc = _new_token(
            token, new_k_slot, new_v_slot, cos, sin, q_scale, q_other_scale, k_scale, k_other_scale, scale, eps,
            owns_new, kv_head, KV_HEADS, GROUP, HEAD_DIM, ROWS, BLOCK_D, NORM, PDL,
        )  # fmt: skip
        top, total, acc = _attend(q, k, v, visible, scale, top, total, acc)
        page = page_ids(table, begin + BLOCK_N, old_end, PAGE, BLOCK_N)
        for start in range(begin + BLOCK_N, old_end, BLOCK_N):
            k, v, visible = _load_tile(
                k_cache, v_cache, page, start, old_end, context - window, kv_head, k_block_stride, v_block_stride,
                HEAD_DIM, PAGE, BLOCK_D, BLOCK_N, HAS_WINDOW,
            )  # fmt: skip
            page = page_ids(table, start + BLOCK_N, old_end, PAGE, BLOCK_N)
            top, total, acc = _attend(q, k, v, visible, scale, top, total, acc)

    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]  # context 0 (a padding row): zeros
    row = tl.arange(0, ROWS)[:, None]
    first_row = sequence.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP
    written = (row < GROUP) & (dim < HEAD_DIM)[None, :]
    whole = True
    if plan is not None or SPLITS > 1:
        whole = (end == context) & (begin == first_key(context, window, HAS_WINDOW, BLOCK_N))
    if whole:
        tl.store(out + (first_row + row) * HEAD_DIM + dim[None, :], acc, mask=written)
    else:
        part = (kv_head * GROUP + tl.arange(0, ROWS)).to(tl.int64) * (tl.num_programs(0) // KV_HEADS) + slot
        tl.store(partial + part[:, None] * HEAD_DIM + dim[None, :], acc, mask=written)
        tl.store(partial_lse + part, top + tl.log2(total), mask=tl.arange(0, ROWS) < GROUP)


def rope_attention(
    qkv: torch.Tensor,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int | None = None,
    max_context_len: int | None = None,
    *,
    plan: SplitPlan | None = None,
    pdl: bool | None = None,
) -> torch.Tensor:
    """One token a sequence: normalise and rotate its queries and key, append key and value, attend.

    qkv: [B, (Hq + 2 Hkv) * D], rows may be strided; q_norm_weight, k_norm_weight: [D] in qkv's dtype, or both None;
    cos_sin: [max_position, D] float32, contiguous, cosines first; caches: [num_blocks, Hkv, block_size, D];
    block_table: [B, max_blocks] int32; context_lens: [B] int32, the new token included: its position is context - 1;
    0 marks a padding row, which stores nothing and whose output is zeros.
    max_context_len: upper bound on context_lens known to the host (under a CUDA graph: for all replays).
    plan: `plan_rope_attention` of the same, made here if None.
    pdl: launch as a programmatic dependent; None = where the GPU can (Hopper and later) and a plan is given. The plan,
    the table, the lengths and the older keys must then be in memory before the kernel in front of this one starts.
    Returns [B, Hq * D], contiguous.
    """
    _check_weights(q_norm_weight, k_norm_weight)
    if not use_triton(qkv):
        return reference.rope_attention(
            qkv, q_norm_weight, k_norm_weight, eps, cos_sin, k_cache, v_cache, block_table, context_lens, scale, window
        )
    _check(qkv, cos_sin, k_cache, v_cache, block_table, context_lens)
    num_seqs, (_, kv_heads, page, dim) = qkv.shape[0], k_cache.shape
    q_heads = qkv.shape[1] // dim - 2 * kv_heads
    out = torch.empty((num_seqs, q_heads * dim), dtype=qkv.dtype, device=qkv.device)
    if not num_seqs:
        return out
    gpu = gpu_of(qkv.device)
    pdl = gpu.pdl and plan is not None if pdl is None else pdl
    if plan is None:
        plan = plan_rope_attention(k_cache, context_lens, max_context_len or block_table.shape[1] * page, window)
    lse, partial = split_workspace(plan.config, qkv, num_seqs, q_heads, dim)
    _rope_attention_kernel[(plan.config.slots(num_seqs) * kv_heads,)](
        qkv, q_norm_weight, k_norm_weight, cos_sin, k_cache, v_cache, block_table, context_lens,
        plan.slots, out, partial, lse, scale * math.log2(math.e), eps,
        qkv.stride(0), block_table.stride(0), k_cache.stride(0), v_cache.stride(0),
        window or 0, plan.config.min_split, PDL=pdl,
        **_constants(q_heads, kv_heads, page, dim, q_norm_weight is not None, window is not None, plan),
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    merge_splits(plan, partial, lse, context_lens, out.view(num_seqs, q_heads, dim), window, pdl)
    return out


def plan_rope_attention(
    k_cache: torch.Tensor, context_lens: torch.Tensor, max_context_len: int, window: int | None = None
) -> SplitPlan:
    """How a step's keys are split, for all layers of one shape and window."""
    return plan_step(rope_attention_config, k_cache, context_lens, max_context_len, window)


def _constants(
    q_heads: int, kv_heads: int, page: int, dim: int, norm: bool, has_window: bool, plan: SplitPlan
) -> dict[str, Any]:
    """What the kernel is compiled for. Above 16 rows of queries a capped thread would spill 200 bytes and more."""
    group, config = q_heads // kv_heads, plan.config
    rows = max(16, next_power_of_2(group))
    return {
        "KV_HEADS": kv_heads, "GROUP": group, "HEAD_DIM": dim, "PAGE": page, "ROWS": rows,
        "BLOCK_D": max(16, next_power_of_2(dim)), "BLOCK_N": config.block_n,
        "NORM": norm, "HAS_WINDOW": has_window, "SPLITS": plan.unshared, "PIPELINED": config.num_stages > 1,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
        "maxnreg": config.max_registers if rows == 16 else None,
    }  # fmt: skip


def _check_weights(q_norm_weight: torch.Tensor | None, k_norm_weight: torch.Tensor | None) -> None:
    if (q_norm_weight is None) != (k_norm_weight is None):
        raise ValueError("q_norm_weight and k_norm_weight must be given together or not at all")


def _check(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
) -> None:
    """Raise the ValueError of tensors that the kernel cannot read."""
    check_cache(k_cache, v_cache)
    require_unit_stride(qkv=qkv, block_table=block_table, context_lens=context_lens)
    if cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous():
        raise ValueError(f"cos_sin must be a contiguous float32 table, got {cos_sin.dtype} {cos_sin.stride()}")
