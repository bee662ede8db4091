"""Attention in plain PyTorch: the CPU path, and the slow twin of the kernels that runs anywhere.

PyTorch knows no paged attention, so pages are gathered first. A CPU pays for every operator (a few microseconds) and
for every byte twice, hence:
* decodes of similar length go through one batched product, padded to the longest of them and masked; the query heads
  that share a KV head are the rows of one small matrix, so K and V are never repeated;
* pages are gathered head by head, straight into the layout the product reads, into a buffer kept between layers and
  steps (fresh megabytes would cost a page fault every 4 KiB);
* index tensors and masks are made once a step and kept in `AttentionMetadata.scratch`.
Chunks run one sequence at a time through `scaled_dot_product_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from nanovllm.layers.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec

_GROUP_COST = 300  # keys that are gathered and multiplied in the time that one more group takes


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where the keys of n sequences lie and who sees them: the part of attention that all layers share."""

    rows: torch.Tensor  # [n * Hkv * pages] int64, rows of the cache seen as [num_blocks * Hkv, page * D]
    shape: tuple[int, int, int]  # (n, Hkv, padded context)
    bias: torch.Tensor | None  # 0 or -inf; decodes: [n * Hkv, 1, padded context]; a chunk: [queries, keys]
    unread: torch.Tensor | None  # gathered tokens to blank: unwritten slots, whose NaN would survive 0 * NaN


class SDPABackend(AttentionBackend):
    """Gathered pages, then PyTorch's own products; any device and dtype."""

    name: ClassVar[str] = "sdpa"

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    @classmethod
    def why_not(cls, spec: AttentionSpec) -> list[str]:
        """It runs anywhere."""
        return []

    def forward(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.forward`."""
        n = metadata.num_decodes
        if n == q.shape[0]:
            return self._decode(q, k_cache, v_cache, metadata, scale, window)
        out = torch.empty_like(q)
        if n:
            out[:n] = self._decode(q[:n], k_cache, v_cache, metadata, scale, window)
        start = n
        for i in range(n, len(metadata.context_lens_cpu)):
            end = start + metadata.query_lens_cpu[i]
            out[start:end] = self._chunk(i, q[start:end], k_cache, v_cache, metadata, scale, window)
            start = end
        return out

    def _decode(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: AttentionMetadata,
        scale: float, window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """q: [n, Hq, D], one token a sequence."""
        groups = metadata.scratch.get(("decode", window))
        if groups is None:
            groups = metadata.scratch["decode", window] = [
                (torch.tensor(members, device=q.device), _plan_decodes(members, metadata, k_cache, q.dtype, window))
                for members in group_by_length(metadata.context_lens_cpu[: metadata.num_decodes])
            ]
        if len(groups) == 1:
            return self._decode_group(q, k_cache, v_cache, groups[0][1], scale)
        out = torch.empty_like(q)
        for members, plan in groups:
            out[members] = self._decode_group(q[members], k_cache, v_cache, plan, scale)
        return out

    def _decode_group(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: _Plan, scale: float
    ) -> torch.Tensor:
        """q: [n, Hq, D], one token of each sequence in the plan."""
        n, kv_heads, _ = plan.shape
        k, v = self._gather("k", k_cache, plan), self._gather("v", v_cache, plan)
        rows = q.reshape(n * kv_heads, -1, q.shape[2])  # the heads of a group are the rows
        if q.dtype != torch.float32:  # a score rounded to half precision would be lost accuracy
            out = F.scaled_dot_product_attention(rows, k, v, attn_mask=plan.bias, scale=scale)
        elif plan.bias is None:
            out = torch.bmm(torch.bmm(rows * scale, k.transpose(1, 2)).softmax(-1), v)
        else:
            out = torch.bmm(torch.baddbmm(plan.bias, rows, k.transpose(1, 2), alpha=scale).softmax(-1), v)
        return out.view(q.shape)

    def _chunk(
        self, i: int, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: AttentionMetadata,
        scale: float, window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """q: [m, Hq, D], the last m tokens of sequence i."""
        plan = metadata.scratch.get(("chunk", i, window))
        if plan is None:
            plan = metadata.scratch["chunk", i, window] = _plan_chunk(i, metadata, k_cache, q.dtype, window)
        keys = q.shape[0] if plan.bias is None else plan.bias.shape[1]
        k, v = (self._gather(name, cache, plan)[:, :keys] for name, cache in (("k", k_cache), ("v", v_cache)))
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], attn_mask=plan.bias, is_causal=plan.bias is None,
            scale=scale, enable_gqa=q.shape[1] != k.shape[0],
        )  # fmt: skip
        return out[0].transpose(0, 1)

    def _gather(self, name: str, cache: torch.Tensor, plan: _Plan) -> torch.Tensor:
        """[n * Hkv, padded context, D]; valid until the next gather under the same name."""
        _, _, page, dim = cache.shape
        size = plan.rows.shape[0] * page * dim
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != cache.dtype or buffer.device != cache.device:
            buffer = self._buffers[name] = torch.empty(size, dtype=cache.dtype, device=cache.device)
        gathered = buffer[:size]
        torch.index_select(cache.view(-1, page * dim), 0, plan.rows, out=gathered.view(-1, page * dim))
        if plan.unread is not None:
            gathered.view(-1, dim).index_fill_(0, plan.unread, 0.0)
        n, kv_heads, context = plan.shape
        return gathered.view(n * kv_heads, context, dim)


def _page_rows(block_ids: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Rows of [num_blocks * Hkv, page * D], ordered (sequence, head, page). block_ids: [n, pages]."""
    head = torch.arange(kv_heads, device=block_ids.device)[None, :, None]
    return (block_ids.long()[:, None, :] * kv_heads + head).reshape(-1)


def _bias(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where visible, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def _unread_tokens(unread: torch.Tensor, kv_heads: int) -> torch.Tensor | None:
    """Indices among gathered tokens [n * Hkv * context] from unread: bool [n, context]; None when there are none."""
    tokens = unread[:, None, :].expand(-1, kv_heads, -1).reshape(-1).nonzero().squeeze(1)
    return tokens if tokens.numel() else None


def group_by_length(lengths: list[int]) -> list[list[int]]:
    """Indices of sequences that are padded together: groups by powers of two, or everybody where that saves little."""
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(length.bit_length(), []).append(i)
    together = len(lengths) * max(lengths)
    apart = sum(len(group) * max(lengths[i] for i in group) for group in groups.values())
    if together - apart <= _GROUP_COST * (len(groups) - 1):
        return [list(range(len(lengths)))]
    return list(groups.values())


def _plan_decodes(
    members: list[int], metadata: AttentionMetadata, cache: torch.Tensor, dtype: torch.dtype, window: int | None
) -> _Plan:
    """Sequences `members`, padded to the longest of them; pages behind every window are left out."""
    _, kv_heads, page, _ = cache.shape
    n = len(members)
    contexts = [metadata.context_lens_cpu[i] for i in members]
    table = metadata.block_table[members]
    first = min(max(length - window, 0) // page for length in contexts) if window is not None else 0
    pages = -(-max(contexts) // page) - first
    lengths = metadata.context_lens[members, None]
    key = torch.arange(first * page, (first + pages) * page, device=cache.device)
    visible = key < lengths
    if window is not None:
        visible &= key >= lengths - window
    # A page nobody sees may hold anything: read the sequence's last one in its place. Of that one, the slots behind
    # the last token are unwritten; all others are the sequence's own.
    seen = visible.view(n, pages, page).any(2)
    last = (lengths - 1) // page
    blocks = torch.where(seen, table[:, first : first + pages], table.gather(1, last.long()))
    is_last = ~seen | (torch.arange(first, first + pages, device=cache.device) == last)
    unwritten = (key % page > (lengths - 1) % page) & is_last.repeat_interleave(page, dim=1)
    unread = _unread_tokens(unwritten, kv_heads)
    rows, shape = _page_rows(blocks, kv_heads), (n, kv_heads, pages * page)
    if bool(visible.all()):
        return _Plan(rows, shape, None, None)
    return _Plan(rows, shape, _bias(visible, dtype)[:, None, None].expand(-1, kv_heads, -1, -1).flatten(0, 1), unread)


def _plan_chunk(
    i: int, metadata: AttentionMetadata, cache: torch.Tensor, dtype: torch.dtype, window: int | None
) -> _Plan:
    """Sequence i alone: its queries are its last tokens; pages behind the first query's window are left out."""
    _, kv_heads, page, _ = cache.shape
    length, queries = metadata.context_lens_cpu[i], metadata.query_lens_cpu[i]
    first = max(length - queries - window + 1, 0) // page if window is not None else 0
    blocks = metadata.block_table[i : i + 1, first : -(-length // page)]
    rows, shape = _page_rows(blocks, kv_heads), (1, kv_heads, blocks.shape[1] * page)
    if queries == length and (window is None or window >= length):
        return _Plan(rows, shape, None, None)  # no prefix: plain causal attention
    position = torch.arange(length - queries, length, device=cache.device)[:, None]
    key = torch.arange(first * page, length, device=cache.device)
    visible = key <= position
    if window is not None:
        visible &= key > position - window
    return _Plan(rows, shape, _bias(visible, dtype), None)
