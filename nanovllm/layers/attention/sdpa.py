"""Attention in plain PyTorch: the CPU path, and the slow twin of the kernels that runs anywhere.

PyTorch knows no paged attention, so pages are gathered first. A CPU pays for every operator (a few microseconds) and
for every byte twice, hence:
* all decodes of a step go through one batched product, with a matrix for each KV head whose rows are the query heads
  that share it, so K and V are never repeated. Contexts of different length are cut into splits of equal length,
  which meet in the softmax, as in flash-decoding (https://pytorch.org/blog/flash-decoding/): little is padded;
* pages are gathered into a buffer kept between layers and steps (fresh megabytes would cost a page fault every 4 KiB);
* index tensors and masks are made once a step and kept in `AttentionMetadata.scratch`.
Chunks run one sequence at a time through `scaled_dot_product_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from nanovllm.layers.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec


_SPLIT = 32  # keys of a split, where contexts differ; longer ones pad more, shorter ones leave BLAS too little
_PADDING = 1.25  # where padding all contexts to the longest gathers at most so many times the pages, nothing is split


@dataclass(frozen=True, slots=True)
class _DecodePlan:
    """How n contexts are cut into S splits of equal length: the part of attention that all layers share."""

    rows: torch.Tensor  # [S * Hkv * pages] int64, rows of the cache seen as [num_blocks * Hkv, page * D]
    owner: torch.Tensor  # [S] int64: which sequence the split belongs to,
    number: torch.Tensor  # [S] int64: as which of its splits
    max_splits: int  # of one sequence
    hidden: torch.Tensor  # [S, 1, keys] bool: padding, and keys before the window
    unread: torch.Tensor  # gathered tokens to blank: padding, whose NaN would survive a weight of 0


@dataclass(frozen=True, slots=True)
class _ChunkPlan:
    """The pages that one sequence's queries see."""

    rows: torch.Tensor  # [Hkv * pages] int64, rows of the cache seen as [num_blocks * Hkv, page * D]
    bias: torch.Tensor | None  # [queries, keys], 0 or -inf; None: plain causal attention


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
        """q: [n, Hq, D], one token a sequence. In float32: a score rounded to half precision is accuracy lost."""
        plan = metadata.scratch.get(("decode", window))
        if plan is None:
            plan = metadata.scratch["decode", window] = _plan_decodes(metadata, k_cache, window)
        (n, q_heads, dim), (splits, _, keys), (_, kv_heads, page, _) = q.shape, plan.hidden.shape, k_cache.shape
        k, v = (
            self._gather(name, cache.view(-1, page * dim), plan.rows).view(splits * kv_heads, keys, dim).float()
            for name, cache in (("k", k_cache), ("v", v_cache))
        )
        v.view(-1, dim).index_fill_(0, plan.unread, 0.0)
        rows = q.float() * scale
        if splits > n:
            rows = rows[plan.owner]
        scores = torch.bmm(rows.view(splits * kv_heads, -1, dim), k.transpose(1, 2)).view(splits, q_heads, keys)
        scores.masked_fill_(plan.hidden, float("-inf"))
        if splits == n:
            weights = scores.softmax(dim=2)
        else:
            weights = _softmax_over_splits(scores, plan, n)
        out = torch.bmm(weights.view(splits * kv_heads, -1, keys), v).view(splits, q_heads, dim)
        if splits > n:
            out = torch.zeros_like(rows[:n]).index_add_(0, plan.owner, out)
        return out.to(q.dtype)

    def _chunk(
        self, i: int, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: AttentionMetadata,
        scale: float, window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """q: [m, Hq, D], the last m tokens of sequence i."""
        plan = metadata.scratch.get(("chunk", i, window))
        if plan is None:
            plan = metadata.scratch["chunk", i, window] = _plan_chunk(i, metadata, k_cache, q.dtype, window)
        _, kv_heads, page, dim = k_cache.shape
        keys = q.shape[0] if plan.bias is None else plan.bias.shape[1]
        k, v = (
            self._gather(name, cache.view(-1, page * dim), plan.rows).view(1, kv_heads, -1, dim)[:, :, :keys]
            for name, cache in (("k", k_cache), ("v", v_cache))
        )
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, attn_mask=plan.bias, is_causal=plan.bias is None,
            scale=scale, enable_gqa=q.shape[1] != kv_heads,
        )  # fmt: skip
        return out[0].transpose(0, 1)

    def _gather(self, name: str, source: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """source[rows] of a matrix; valid until the next gather under the same name."""
        width = source.shape[1]
        size = rows.shape[0] * width
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != source.dtype or buffer.device != source.device:
            buffer = self._buffers[name] = torch.empty(size, dtype=source.dtype, device=source.device)
        return torch.index_select(source, 0, rows, out=buffer[:size].view(-1, width))


def _softmax_over_splits(scores: torch.Tensor, plan: _DecodePlan, n: int) -> torch.Tensor:
    """Softmax over all keys of a sequence, in place. scores: [S, Hq, keys]."""
    largest = scores.new_full((n, plan.max_splits, scores.shape[1]), float("-inf"))
    largest[plan.owner, plan.number] = scores.amax(dim=2)
    weights = scores.sub_(largest.amax(dim=1)[plan.owner].unsqueeze(2)).exp_()
    total = scores.new_zeros(n, scores.shape[1]).index_add_(0, plan.owner, weights.sum(dim=2))
    return weights.div_(total[plan.owner].unsqueeze(2))


def _plan_decodes(metadata: AttentionMetadata, cache: torch.Tensor, window: int | None) -> _DecodePlan:
    """The step's decodes; pages wholly before a sequence's window are left out, as they may have been recycled."""
    _, kv_heads, page, _ = cache.shape
    device, n = cache.device, metadata.num_decodes
    lengths = metadata.context_lens[:n].long()
    start = (lengths - window).clamp(min=0) if window is not None else torch.zeros_like(lengths)
    first, last = start // page, (lengths - 1) // page
    pages = last - first + 1
    most = int(pages.max())
    size = most if n * most <= _PADDING * int(pages.sum()) else max(_SPLIT // page, 1)  # pages of a split
    splits = (pages + size - 1) // size
    owner = torch.arange(n, device=device).repeat_interleave(splits)
    number = torch.arange(len(owner), device=device) - (splits.cumsum(0) - splits)[owner]
    column = (first[owner] + number * size)[:, None] + torch.arange(size, device=device)  # [S, size]
    key = (column[:, :, None] * page + torch.arange(page, device=device)).flatten(1)  # [S, size * page]
    unread = key >= lengths[owner, None]
    # Behind its last page, a sequence's table may name anything.
    blocks = metadata.block_table[owner[:, None], column.minimum(last[owner, None])].long()
    return _DecodePlan(
        rows=_page_rows(blocks, kv_heads),
        owner=owner,
        number=number,
        max_splits=int(splits.max()),
        hidden=(unread | (key < start[owner, None])).unsqueeze(1),
        unread=unread[:, None].expand(-1, kv_heads, -1).reshape(-1).nonzero().squeeze(1),
    )


def _page_rows(blocks: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Rows of [num_blocks * Hkv, page * D], ordered (n, head, page). blocks: [n, pages] int64."""
    heads = torch.arange(kv_heads, device=blocks.device)[:, None]
    return (blocks[:, None] * kv_heads + heads).flatten()


def _plan_chunk(
    i: int, metadata: AttentionMetadata, cache: torch.Tensor, dtype: torch.dtype, window: int | None
) -> _ChunkPlan:
    """Sequence i alone: its queries are its last tokens; pages behind the first query's window are left out."""
    _, kv_heads, page, _ = cache.shape
    length, queries = metadata.context_lens_cpu[i], metadata.query_lens_cpu[i]
    first = max(length - queries - window + 1, 0) // page if window is not None else 0
    rows = _page_rows(metadata.block_table[i : i + 1, first : -(-length // page)].long(), kv_heads)
    if queries == length and (window is None or window >= length):
        return _ChunkPlan(rows, None)  # no prefix: plain causal attention
    position = torch.arange(length - queries, length, device=cache.device)[:, None]
    key = torch.arange(first * page, length, device=cache.device)
    visible = key <= position
    if window is not None:
        visible &= key > position - window
    bias = torch.zeros(visible.shape, dtype=dtype, device=cache.device).masked_fill_(~visible, float("-inf"))
    return _ChunkPlan(rows, bias)
