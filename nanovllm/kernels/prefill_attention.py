"""Causal attention of chunks of queries against paged keys and values (FlashAttention-2, arXiv 2307.08691).

A chunk is the last `query_len` tokens of a sequence's `context_len`; the keys before it may come from earlier chunks
or from the prefix cache. Keys and values are read from the pages, where this step has already stored its own.

Grid: (group of query heads, tile). Tiles are numbered through all chunks without a table: chunk i starts at tile
query_start[i] // BLOCK_Q + i, which leaves room for its last, partial tile; a program finds its chunk by counting
the starts at or below its number. Rows of a tile are tokens x `PACK` query heads of one KV head.
Key tiles fall in three runs: behind the window's edge (masked), fully visible (no mask at all), the diagonal (masked).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from nanovllm.kernels import reference
from nanovllm.kernels.jit import gpu_of, jit, require_unit_stride, use_triton
from nanovllm.kernels.kv_cache import check_cache, page_ids
from nanovllm.kernels.launch_config import PrefillConfig, next_power_of_2, prefill_config

if TYPE_CHECKING:
    import triton.language as tl


@jit()
def _attend_tiles(
    acc, top, total, query, k_cache, v_cache, table, k_block_stride, v_block_stride, page_base, position,
    begin, end, oldest, context, window, scale,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles in [begin, end). Keys outside [oldest, context) are not read if MASKED."""
    dim = tl.arange(0, BLOCK_D)
    page = page_ids(table, begin, end, PAGE, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        inner = page_base + (key % PAGE) * HEAD_DIM
        k_pointer = k_cache + (page * k_block_stride + inner)[:, None] + dim[None, :]
        v_pointer = v_cache + (page * v_block_stride + inner)[:, None] + dim[None, :]
        if MASKED:
            exists = (key < context) & (key >= oldest)
            load = exists[:, None] & (dim < HEAD_DIM)[None, :]
            k = tl.load(k_pointer, mask=load, other=0.0)
            v = tl.load(v_pointer, mask=load, other=0.0)
        elif BLOCK_D == HEAD_DIM:
            k = tl.load(k_pointer)
            v = tl.load(v_pointer)
        else:
            k = tl.load(k_pointer, mask=(dim < HEAD_DIM)[None, :], other=0.0)
            v = tl.load(v_pointer, mask=(dim < HEAD_DIM)[None, :], other=0.0)
        page = page_ids(table, start + BLOCK_N, end, PAGE, BLOCK_N)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee")
        if MASKED:
            visible = key[None, :] <= position[:, None]
            if HAS_WINDOW:
                visible = visible & (key[None, :] > position[:, None] - window)
            # Scaled before masking: as a fused multiply-add, (-1e38) * scale - top is rounding noise of 1e30, not 0.
            scores = tl.where(visible, scores * scale, -1.0e38)
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_top[:, None])
        else:
            new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
            weights = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@jit(
    do_not_specialize=("table_stride", "num_seqs", "window"),
    unaligned=("block_table", "query_start", "context_lens"),
)
def _prefill_kernel(
    q, k_cache, v_cache, block_table, query_start, context_lens, out,
    scale, num_seqs, q_stride, out_stride, table_stride, k_block_stride, v_block_stride, window,
    GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """q, out: [T, Hq, HEAD_DIM]; query_start: [num_seqs + 1]; the last tiles, which see the most keys, start first."""
    BLOCK_Q: tl.constexpr = BLOCK_M // PACK
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    origin = tl.load(query_start)
    sequence = tl.full((), -1, tl.int32)
    for base in range(0, num_seqs, 128):
        index = base + tl.arange(0, 128)
        start = tl.load(query_start + index, mask=index < num_seqs, other=0)
        before = (index < num_seqs) & ((start - origin) // BLOCK_Q + index <= tile)
        sequence += tl.sum(before.to(tl.int32))
    query_begin = tl.load(query_start + sequence)
    query_len = tl.load(query_start + sequence + 1) - query_begin
    offset = (tile - (query_begin - origin) // BLOCK_Q - sequence) * BLOCK_Q
    if offset >= query_len:
        return
    context = tl.load(context_lens + sequence)

    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    token = offset + row // PACK
    head = tl.program_id(0) * PACK + row % PACK
    page_base = tl.program_id(0) * PACK // GROUP * (PAGE * HEAD_DIM)
    inside = (token < query_len)[:, None] & (dim < HEAD_DIM)[None, :]
    place = (query_begin + token).to(tl.int64)
    query_pointer = q + (place * q_stride + head * HEAD_DIM)[:, None] + dim[None, :]
    query = tl.load(query_pointer, mask=inside, other=0.0)
    table = block_table + sequence.to(tl.int64) * table_stride

    first_position = context - query_len + offset
    position = first_position + row // PACK
    end = tl.minimum(first_position + BLOCK_Q, context)
    oldest = 0
    begin = 0
    edge_end = 0
    if HAS_WINDOW:
        oldest = tl.maximum(first_position - window + 1, 0)
        begin = oldest // BLOCK_N * BLOCK_N
        edge_end = tl.maximum(tl.cdiv(end - window, BLOCK_N) * BLOCK_N, begin)
    diagonal = tl.maximum((first_position + 1) // BLOCK_N * BLOCK_N, edge_end)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), -1.0e38, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_WINDOW:
        acc, top, total = _attend_tiles(
            acc, top, total, query, k_cache, v_cache, table, k_block_stride, v_block_stride, page_base, position,
            begin, tl.minimum(edge_end, end), oldest, end, window, scale,
            HEAD_DIM, PAGE, BLOCK_D, BLOCK_N, HAS_WINDOW, True,
        )  # fmt: skip
    acc, top, total = _attend_tiles(
        acc, top, total, query, k_cache, v_cache, table, k_block_stride, v_block_stride, page_base, position,
        edge_end, diagonal, oldest, end, window, scale,
        HEAD_DIM, PAGE, BLOCK_D, BLOCK_N, HAS_WINDOW, False,
    )  # fmt: skip
    acc, top, total = _attend_tiles(
        acc, top, total, query, k_cache, v_cache, table, k_block_stride, v_block_stride, page_base, position,
        diagonal, end, oldest, end, window, scale,
        HEAD_DIM, PAGE, BLOCK_D, BLOCK_N, HAS_WINDOW, True,
    )  # fmt: skip
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    target = out + (place * out_stride + head * HEAD_DIM)[:, None] + dim[None, :]
    tl.store(target, acc, mask=inside)


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int | None = None,
    out: torch.Tensor | None = None,
    *,
    config: PrefillConfig | None = None,
) -> torch.Tensor:
    """Chunk i (rows query_start[i] .. query_start[i + 1] of q) attends causally to its sequence's pages.

    q: [T, Hq, D]; k_cache, v_cache: [num_blocks, Hkv, block_size, D]; block_table: [B, max_blocks] int32;
    query_start: [B + 1] int32, may start above 0 (decodes come first in a mixed step); context_lens: [B] int32, the
    chunk included; max_query_len: the longest chunk; window: keys a query sees, itself included, None = all.
    Returns [T, Hq, D], in `out` if given; rows outside every chunk are left as they are.
    """
    if not use_triton(q):
        result = reference.prefill_attention(q, k_cache, v_cache, block_table, query_start, context_lens, scale, window)
        if out is None:
            return result
        rows = slice(int(query_start[0]), int(query_start[-1]))
        out[rows] = result[rows]
        return out
    check_cache(k_cache, v_cache)
    require_unit_stride(block_table=block_table, query_start=query_start, context_lens=context_lens)
    tokens, q_heads, dim = q.shape
    _, kv_heads, page, _ = k_cache.shape
    num_seqs = context_lens.shape[0]
    out = torch.empty_like(q) if out is None else out
    if q.stride()[1:] != (dim, 1) or out.stride()[1:] != (dim, 1):
        raise ValueError(f"q and out must be contiguous within a token, got strides {q.stride()} and {out.stride()}")
    if not num_seqs:
        return out
    group = q_heads // kv_heads
    config = config or prefill_config(tokens, q_heads, group, dim, q.element_size(), gpu_of(q.device))
    tiles = tokens // (config.block_m // config.pack) + num_seqs
    _prefill_kernel[(q_heads // config.pack, tiles)](
        q, k_cache, v_cache, block_table, query_start, context_lens, out,
        scale * math.log2(math.e), num_seqs, q.stride(0), out.stride(0), block_table.stride(0),
        k_cache.stride(0), v_cache.stride(0), window or 0,
        GROUP=group, PACK=config.pack, HEAD_DIM=dim, PAGE=page, BLOCK_M=config.block_m,
        BLOCK_D=next_power_of_2(dim), BLOCK_N=config.block_n, HAS_WINDOW=window is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
