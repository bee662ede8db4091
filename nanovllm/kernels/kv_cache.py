"""Scatter the K and V rows of a step into the paged cache.

Cache layout: [num_blocks, num_kv_heads, block_size, head_dim], so that one head's page is contiguous.
Slot of a token = block * block_size + offset within the block; slot -1 means "already stored, skip".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nanovllm.kernels import reference
from nanovllm.kernels.jit import jit, require_unit_stride, use_triton
from nanovllm.kernels.launch_config import next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl


@jit()
def _store_kv_kernel(
    k, v, k_cache, v_cache, slot_mapping, k_stride, v_stride, k_block_stride, v_block_stride,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a token. k, v: [T, KV_HEADS * HEAD_DIM] with row strides."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    head = tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < KV_HEADS) & (dim < HEAD_DIM)
    source = head * HEAD_DIM + dim
    target = head * (PAGE * HEAD_DIM) + (slot % PAGE) * HEAD_DIM + dim
    tl.store(
        k_cache + (slot // PAGE) * k_block_stride + target, tl.load(k + token * k_stride + source, mask=inside), inside
    )
    tl.store(
        v_cache + (slot // PAGE) * v_block_stride + target, tl.load(v + token * v_stride + source, mask=inside), inside
    )


@jit()
def page_ids(table, start, end, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks of the keys start .. start + BLOCK_N: a scalar when one page holds them all, else one a key. int64.

    Attention loops carry the ids of their *next* tile: with the lookup inside the tile's own iteration, Triton's
    pipeliner sees K and V behind an indirect load and keeps half as many of their tiles in flight.
    """
    if BLOCK_N <= PAGE:
        return tl.load(table + start // PAGE, mask=start < end, other=0).to(tl.int64)
    else:
        key = start + tl.arange(0, BLOCK_N)
        return tl.load(table + key // PAGE, mask=key < end, other=0).to(tl.int64)


def check_cache(k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor | None = None) -> None:
    """Raise `ValueError` unless both caches have the layout above and pages are contiguous within a block."""
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            "k_cache and v_cache must both be [num_blocks, num_kv_heads, block_size, head_dim], "
            f"got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    _, _, page, dim = k_cache.shape
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride()[1:] != (page * dim, dim, 1):
            raise ValueError(f"{name} must be contiguous within a block, got strides {cache.stride()}")
    if slot_mapping is not None and slot_mapping.dtype != torch.int64:
        raise ValueError(f"slot_mapping must be int64, got {slot_mapping.dtype}")


def store_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write k and v ([T, Hkv, D], token rows may be strided) into the caches at `slot_mapping` ([T] int64)."""
    if not use_triton(k):
        return reference.store_kv(k, v, k_cache, v_cache, slot_mapping)
    check_cache(k_cache, v_cache, slot_mapping)
    tokens, heads, dim = k.shape
    if k.stride()[1:] != (dim, 1) or v.stride()[1:] != (dim, 1):
        raise ValueError(f"k and v must be contiguous within a token, got strides {k.stride()} and {v.stride()}")
    require_unit_stride(slot_mapping=slot_mapping)
    if tokens:
        _store_kv_kernel[(tokens,)](
            k, v, k_cache, v_cache, slot_mapping, k.stride(0), v.stride(0), k_cache.stride(0), v_cache.stride(0),
            KV_HEADS=heads, HEAD_DIM=dim, PAGE=k_cache.shape[2], HEADS=next_power_of_2(heads),
            BLOCK_D=next_power_of_2(dim), num_warps=4,
        )  # fmt: skip
    return None
