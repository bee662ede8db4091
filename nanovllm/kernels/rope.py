"""Everything between the QKV projection and attention, in one pass over its output.

Per token: optional RMSNorm of each query and key head (Qwen3), rotary embedding of queries and keys, and the store of
keys and values into the paged cache. Unfused these are four kernels that each read and write the same rows.

Rotation is the "neox" one (half-split): with x = [x1, x2], y = [x1 cos - x2 sin, x2 cos + x1 sin].
Cast order: norm as in `norm`; rotation in float32 on the rounded values, rounded once. (Hugging Face rotates in x's
dtype with a rounded table: the same in float32, slightly less exact in half precision.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nanovllm.kernels import reference
from nanovllm.kernels.jit import jit, require_unit_stride, use_triton
from nanovllm.kernels.kv_cache import check_cache
from nanovllm.kernels.launch_config import HeadConfig, cdiv, next_power_of_2, rope_config

if TYPE_CHECKING:
    import triton.language as tl


@jit()
def _norm_rope(source, weight, cos, sin, inside, dim, eps, NORM: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Load heads at `source` ([HEADS, 1] pointers), normalise, rotate; returns both halves, float32 [HEADS, half]."""
    HALF: tl.constexpr = HEAD_DIM // 2
    low = tl.load(source + dim, mask=inside, other=0.0)
    high = tl.load(source + HALF + dim, mask=inside, other=0.0)
    dtype = low.dtype
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    if NORM:
        square = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
        rstd = tl.rsqrt(square / HEAD_DIM + eps)[:, None]
        low = ((low * rstd).to(dtype) * tl.load(weight + dim, mask=dim < HALF, other=0.0)).to(tl.float32)
        high = ((high * rstd).to(dtype) * tl.load(weight + HALF + dim, mask=dim < HALF, other=0.0)).to(tl.float32)
    return low * cos - high * sin, high * cos + low * sin


@jit()
def _qk_norm_rope_store_kernel(
    qkv, q_weight, k_weight, cos_sin, positions, k_cache, v_cache, slot_mapping, q_out,
    qkv_stride, k_block_stride, v_block_stride, eps,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, NORM: tl.constexpr,
    HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (token, i): the first ceil(Q_HEADS / HEADS) values of i are groups of query heads, then KV heads."""
    HALF: tl.constexpr = HEAD_DIM // 2
    Q_GROUPS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    dim = tl.arange(0, HALF_BLOCK)[None, :]
    position = tl.load(positions + token)
    angle = cos_sin + position * HEAD_DIM + dim
    cos = tl.load(angle, mask=dim < HALF, other=0.0)
    sin = tl.load(angle + HALF, mask=dim < HALF, other=0.0)
    row = qkv + token * qkv_stride
    if group < Q_GROUPS:
        head = group * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (head < Q_HEADS) & (dim < HALF)
        low, high = _norm_rope(row + head * HEAD_DIM, q_weight, cos, sin, inside, dim, eps, NORM, HEAD_DIM)
        target = q_out + token * (Q_HEADS * HEAD_DIM) + head * HEAD_DIM + dim
        tl.store(target, low, mask=inside)
        tl.store(target + HALF, high, mask=inside)
    else:
        slot = tl.load(slot_mapping + token)
        if slot >= 0:
            head = (group - Q_GROUPS) * HEADS + tl.arange(0, HEADS)[:, None]
            inside = (head < KV_HEADS) & (dim < HALF)
            key = row + (Q_HEADS + head) * HEAD_DIM
            value = row + (Q_HEADS + KV_HEADS + head) * HEAD_DIM + dim
            value_low = tl.load(value, mask=inside, other=0.0)
            value_high = tl.load(value + HALF, mask=inside, other=0.0)
            low, high = _norm_rope(key, k_weight, cos, sin, inside, dim, eps, NORM, HEAD_DIM)
            offset = head * (PAGE * HEAD_DIM) + (slot % PAGE) * HEAD_DIM + dim
            k_target = k_cache + (slot // PAGE) * k_block_stride + offset
            v_target = v_cache + (slot // PAGE) * v_block_stride + offset
            tl.store(k_target, low, mask=inside)
            tl.store(k_target + HALF, high, mask=inside)
            tl.store(v_target, value_low, mask=inside)
            tl.store(v_target + HALF, value_high, mask=inside)


def qk_norm_rope_store(
    qkv: torch.Tensor,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    config: HeadConfig | None = None,
) -> torch.Tensor:
    """Normalise (optional) and rotate queries and keys, store keys and values, return the queries.

    qkv: [T, (Hq + 2 Hkv) * D], rows may be strided; q_norm_weight, k_norm_weight: [D] in qkv's dtype, or both None;
    cos_sin: [max_position, D] float32, cosines in the first half of a row and sines in the second, contiguous;
    positions: [T] int64; k_cache, v_cache: [num_blocks, Hkv, block_size, D]; slot_mapping: [T] int64, -1 = skip.
    Returns q: [T, Hq, D], contiguous.
    """
    if (q_norm_weight is None) != (k_norm_weight is None):
        raise ValueError("q_norm_weight and k_norm_weight must be given together or not at all")
    if not use_triton(qkv):
        return reference.qk_norm_rope_store(
            qkv, q_norm_weight, k_norm_weight, eps, cos_sin, positions, k_cache, v_cache, slot_mapping
        )
    check_cache(k_cache, v_cache, slot_mapping)
    require_unit_stride(qkv=qkv, positions=positions, slot_mapping=slot_mapping)
    if cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous():
        raise ValueError(f"cos_sin must be a contiguous float32 table, got {cos_sin.dtype} {cos_sin.stride()}")
    _, kv_heads, page, dim = k_cache.shape
    tokens = qkv.shape[0]
    q_heads = qkv.shape[1] // dim - 2 * kv_heads
    q = torch.empty((tokens, q_heads, dim), dtype=qkv.dtype, device=qkv.device)
    if tokens:
        config = config or rope_config(tokens, q_heads, kv_heads)
        grid = (tokens, cdiv(q_heads, config.heads) + cdiv(kv_heads, config.heads))
        _qk_norm_rope_store_kernel[grid](
            qkv, q_norm_weight, k_norm_weight, cos_sin, positions, k_cache, v_cache, slot_mapping, q,
            qkv.stride(0), k_cache.stride(0), v_cache.stride(0), eps,
            Q_HEADS=q_heads, KV_HEADS=kv_heads, HEAD_DIM=dim, PAGE=page, NORM=q_norm_weight is not None,
            HEADS=config.heads, HALF_BLOCK=next_power_of_2(dim // 2), num_warps=config.num_warps,
        )  # fmt: skip
    return q
