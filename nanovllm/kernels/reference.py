"""The PyTorch body of every kernel: specification, CPU path, fallback, test reference and bench baseline. Written once.

Each function has the signature and the cast order of its Triton twin; read these first. They favour clarity, except
that those on the CPU engine's path (everything but the two attentions) avoid needless operators.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """weight * (x / rms(x)): normalised in float32 (float64 in itself), rounded to x's dtype, then scaled.

    x: [..., K], weight: [K] or None for ones.
    """
    if x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    normed = F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype)
    return normed if weight is None else normed * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual). x, residual: [..., K]."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for x = [gate | up]: [..., 2I] -> [..., I]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def rms_silu_mul(y: torch.Tensor, x: torch.Tensor, eps: float, bias: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up for [gate | up] = y / rms(x) + bias, in float32. y: [..., 2I], x: [..., K] -> [..., I]."""
    wide = y.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return silu_mul(wide if bias is None else wide + bias.float()).to(y.dtype)


def rms_norm_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """act(linear(rms_norm(x), weight, bias)) + residual. x: [..., K], weight: [N, K], for "swiglu" [2N, K].

    The operators of an unfused model, each rounding to x's dtype. norm_weight None: ones. residual: [..., N].
    """
    y = F.linear(rms_norm(x, norm_weight, eps), weight, bias)
    if activation == "swiglu":
        y = silu_mul(y)
    return y if residual is None else y + residual


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half-split rotation in float32, rounded once. x: [T, H, D]; cos, sin: [T, 1, D / 2] float32."""
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def store_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """k_cache[slot // page, :, slot % page] = k for every slot >= 0. k, v: [T, Hkv, D]."""
    if slot_mapping.numel() and int(slot_mapping.min()) < 0:
        keep = slot_mapping >= 0
        k, v, slot_mapping = k[keep], v[keep], slot_mapping[keep]
    page = k_cache.shape[2]
    block, offset = slot_mapping // page, slot_mapping % page
    k_cache[block, :, offset] = k
    v_cache[block, :, offset] = v


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
) -> torch.Tensor:
    """Normalise and rotate queries and keys, store keys and values. qkv: [T, (Hq + 2 Hkv) * D]; returns [T, Hq, D]."""
    kv_heads, dim = k_cache.shape[1], k_cache.shape[3]
    heads = qkv.view(qkv.shape[0], -1, dim)
    q_heads = heads.shape[1] - 2 * kv_heads
    queries_and_keys, v = heads[:, : q_heads + kv_heads], heads[:, q_heads + kv_heads :]
    if q_norm_weight is not None and k_norm_weight is not None:
        q = rms_norm(queries_and_keys[:, :q_heads], q_norm_weight, eps)
        k = rms_norm(queries_and_keys[:, q_heads:], k_norm_weight, eps)
        queries_and_keys = torch.cat((q, k), dim=1)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    rotated = rotate(queries_and_keys, cos, sin)
    store_kv(rotated[:, q_heads:], v, k_cache, v_cache, slot_mapping)
    return rotated[:, :q_heads].contiguous()


def gather_pages(cache: torch.Tensor, block_ids: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` tokens of a sequence: [Hkv, length, D] from cache [num_blocks, Hkv, page, D]."""
    pages = cache[block_ids.long()]  # [n, Hkv, page, D]
    return pages.transpose(0, 1).reshape(cache.shape[1], -1, cache.shape[3])[:, :length]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """Causal attention of the last tokens of one sequence, in float32.

    q: [n, Hq, D], the last n of the m tokens in k, v: [Hkv, m, D]. Returns [n, Hq, D] in q's dtype.
    """
    n, q_heads, _ = q.shape
    kv_heads, m, _ = k.shape
    k, v = (t.float().repeat_interleave(q_heads // kv_heads, dim=0) for t in (k, v))
    position = torch.arange(m - n, m, device=q.device)[:, None]
    key = torch.arange(m, device=q.device)[None, :]
    visible = key <= position
    if window is not None:
        visible &= key > position - window
        v = v.masked_fill(~visible.any(0)[None, :, None], 0.0)  # pages behind the window may be recycled
    scores = torch.einsum("nhd,hmd->hnm", q.float(), k) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hnm,hmd->nhd", weights, v).to(q.dtype)


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """One query token a sequence against its pages. q: [B, Hq, D]; rows of context 0 give zeros."""
    out = torch.zeros_like(q)
    for i, length in enumerate(context_lens.tolist()):
        if length:
            k = gather_pages(k_cache, block_table[i, : -(-length // k_cache.shape[2])], length)
            v = gather_pages(v_cache, block_table[i, : -(-length // k_cache.shape[2])], length)
            out[i] = attend(q[i : i + 1], k, v, scale, window)[0]
    return out


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Chunks of queries against their sequences' pages. q: [T, Hq, D]; query_start: [B + 1] rows of q."""
    out = torch.zeros_like(q)
    starts = query_start.tolist()
    for i, length in enumerate(context_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        blocks = block_table[i, : -(-length // k_cache.shape[2])]
        k, v = (gather_pages(cache, blocks, length) for cache in (k_cache, v_cache))
        out[rows] = attend(q[rows], k, v, scale, window)
    return out


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
) -> torch.Tensor:
    """`qk_norm_rope_store` and `decode_attention` of one token a sequence, the last of its context. [B, Hq * D]."""
    page = k_cache.shape[2]
    positions = (context_lens.long() - 1).clamp(min=0)
    blocks = block_table.gather(1, (positions // page)[:, None]).squeeze(1).long()
    slots = torch.where(context_lens > 0, blocks * page + positions % page, -1)
    q = qk_norm_rope_store(qkv, q_norm_weight, k_norm_weight, eps, cos_sin, positions, k_cache, v_cache, slots)
    return decode_attention(q, k_cache, v_cache, block_table, context_lens, scale, window).flatten(1)


def fetch_step_(
    turn: torch.Tensor, source: tuple[torch.Tensor, ...], target: tuple[torch.Tensor, ...], rows: int, width: int
) -> None:
    """See `fetch.fetch_step_`."""
    slot = int(turn[0])
    target[0][:, :rows] = source[0][slot, :, :rows]
    target[1][:rows] = source[1][slot, :rows]
    target[2][:rows, :width] = source[2][slot, :rows, :width]
    turn[1] = slot


def feed_tokens_(ids: torch.Tensor, sampled: torch.Tensor) -> None:
    """ids [T] int64, in place: every id -1 - r becomes sampled[r]."""
    ids.copy_(torch.where(ids < 0, sampled[(-1 - ids).clamp(min=0)], ids))


def embed_fed(ids: torch.Tensor, sampled: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows of table [vocab, width] at the tokens that ids [T] int64 stand for: -1 - r for sampled[r]."""
    return table[torch.where(ids < 0, sampled[(-1 - ids).clamp(min=0)], ids)]
