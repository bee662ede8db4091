"""Attention in plain PyTorch: the CPU path, and the slow twin of the kernels that runs anywhere.

PyTorch knows no paged attention, so pages are gathered first. A CPU pays for every operator (a few microseconds) and
for every byte twice, hence:
* all decodes of a step go through one batched product, with a matrix for each KV head whose rows are the query heads
  that share it, so K and V are never repeated. Contexts of different length are cut into splits of equal length,
  which meet in the softmax, as in flash-decoding (https://pytorch.org/blog/flash-decoding/): little is padded;
* pages are gathered into buffers kept between layers and steps (fresh megabytes would cost a page fault every 4 KiB);
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

_Buffers = dict[str, torch.Tensor]  # flat, by "k" and "v"


@dataclass(frozen=True, slots=True)
class _Pages:
    """Which pages every layer gathers, and where to."""

    rows: torch.Tensor  # [R] int64, rows of a cache seen as [num_blocks * Hkv, page * D]
    k: torch.Tensor  # [R, page * D], overwritten by the next gather of any plan
    v: torch.Tensor

    @classmethod
    def build(cls, blocks: torch.Tensor, cache: torch.Tensor, buffers: _Buffers) -> _Pages:
        """Pages in the order (sequence or split, head, page). blocks: [n, pages]."""
        _, kv_heads, page, dim = cache.shape
        heads = torch.arange(kv_heads, device=cache.device)[:, None]
        rows = (blocks.long()[:, None] * kv_heads + heads).flatten()
        size = rows.shape[0] * page * dim
        for name in ("k", "v"):
            if name not in buffers or buffers[name].numel() < size:
                buffers[name] = torch.empty(size, dtype=cache.dtype, device=cache.device)
        return cls(rows, *(buffers[name][:size].view(-1, page * dim) for name in ("k", "v")))

    def gather(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        """Fill `k` and `v`."""
        width = self.k.shape[1]
        torch.index_select(k_cache.view(-1, width), 0, self.rows, out=self.k)
        torch.index_select(v_cache.view(-1, width), 0, self.rows, out=self.v)


@dataclass(frozen=True, slots=True)
class _Splits:
    """Which sequence each of S splits belongs to."""

    owner: torch.Tensor  # [S] int64
    number: torch.Tensor  # [S] int64: it is the owner's split of this number
    most: int  # splits of one sequence


@dataclass(frozen=True, slots=True)
class _DecodePlan:
    """How n contexts are cut into S splits of the same number of keys: the part of attention that all layers share."""

    pages: _Pages
    bias: torch.Tensor  # [S * Hkv, 1, keys] float32: -inf for padding and for keys before the window, else 0
    padding: torch.Tensor  # rows of [S * Hkv * keys, D] to blank: what lies there may be NaN, which no bias hides
    splits: _Splits | None  # None: each context is one split


@dataclass(frozen=True, slots=True)
class _ChunkPlan:
    """What one sequence's queries see."""

    pages: _Pages
    bias: torch.Tensor | None  # [queries, keys], 0 or -inf; None: plain causal attention


class SDPABackend(AttentionBackend):
    """Gathered pages, then PyTorch's own products; any device and dtype."""

    name: ClassVar[str] = "sdpa"

    def __init__(self) -> None:
        self._buffers: _Buffers = {}  # of one dtype and device: an engine has one cache

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
            plan = metadata.scratch["decode", window] = _plan_decodes(metadata, k_cache, window, self._buffers)
        (matrices, _, keys), (n, q_heads, dim), splits = plan.bias.shape, q.shape, plan.splits
        plan.pages.gather(k_cache, v_cache)
        for pages in (plan.pages.k, plan.pages.v):
            pages.view(-1, dim).index_fill_(0, plan.padding, 0.0)
        k, v = (pages.view(matrices, keys, dim).float() for pages in (plan.pages.k, plan.pages.v))
        rows = q.float() if splits is None else q.float()[splits.owner]
        scores = torch.baddbmm(plan.bias, rows.view(matrices, -1, dim), k.transpose(1, 2), alpha=scale)
        if splits is None:
            return torch.bmm(scores.softmax(dim=2), v).view(n, q_heads, dim).to(q.dtype)
        weights = _softmax_over_splits(scores.view(-1, q_heads, keys), splits, n)
        parts = torch.bmm(weights.view(matrices, -1, keys), v).view(-1, q_heads, dim)
        return parts.new_zeros(n, q_heads, dim).index_add_(0, splits.owner, parts).to(q.dtype)

    def _chunk(
        self, i: int, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: AttentionMetadata,
        scale: float, window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """q: [m, Hq, D], the last m tokens of sequence i."""
        plan = metadata.scratch.get(("chunk", i, window))
        if plan is None:
            plan = _plan_chunk(i, metadata, k_cache, q.dtype, window, self._buffers)
            metadata.scratch["chunk", i, window] = plan
        _, kv_heads, _, dim = k_cache.shape
        keys = q.shape[0] if plan.bias is None else plan.bias.shape[1]
        plan.pages.gather(k_cache, v_cache)
        k, v = (pages.view(1, kv_heads, -1, dim)[:, :, :keys] for pages in (plan.pages.k, plan.pages.v))
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, attn_mask=plan.bias, is_causal=plan.bias is None,
            scale=scale, enable_gqa=q.shape[1] != kv_heads,
        )  # fmt: skip
        return out[0].transpose(0, 1)


def _softmax_over_splits(scores: torch.Tensor, splits: _Splits, n: int) -> torch.Tensor:
    """Softmax over all keys of a sequence, in place. scores: [S, Hq, keys]."""
    heads = scores.shape[1]
    largest = scores.new_full((n, splits.most, heads), float("-inf"))
    largest[splits.owner, splits.number] = scores.amax(dim=2)
    weights = scores.sub_(largest.amax(dim=1)[splits.owner].unsqueeze(2)).exp_()
    total = scores.new_zeros(n, heads).index_add_(0, splits.owner, weights.sum(dim=2))
    return weights.div_(total[splits.owner].unsqueeze(2))


def _plan_decodes(
    metadata: AttentionMetadata, cache: torch.Tensor, window: int | None, buffers: _Buffers
) -> _DecodePlan:
    """The step's decodes; pages wholly before a sequence's window are left out, as they may have been recycled."""
    _, kv_heads, page, _ = cache.shape
    n, device = metadata.num_decodes, cache.device
    lengths = metadata.context_lens[:n].long()
    start = (lengths - window).clamp(min=0) if window is not None else torch.zeros_like(lengths)
    first, last = start // page, (lengths - 1) // page
    pages = last - first + 1
    most = int(pages.max())
    size = most if n * most <= _PADDING * int(pages.sum()) else max(_SPLIT // page, 1)  # pages of a split
    counts = (pages + size - 1) // size
    owner = torch.arange(n, device=device).repeat_interleave(counts)
    number = torch.arange(len(owner), device=device) - (counts.cumsum(0) - counts)[owner]
    column = (first[owner] + number * size)[:, None] + torch.arange(size, device=device)  # [S, size]
    # Behind its last page, a sequence's row of the table may name anything.
    blocks = metadata.block_table[owner[:, None], column.minimum(last[owner, None])]
    key = (column[:, :, None] * page + torch.arange(page, device=device)).flatten(1)  # [S, size * page]
    padding = key >= lengths[owner, None]
    hidden = padding | (key < start[owner, None])
    return _DecodePlan(
        pages=_Pages.build(blocks, cache, buffers),
        bias=_bias(hidden, torch.float32).repeat_interleave(kv_heads, dim=0).unsqueeze(1),
        padding=padding.repeat_interleave(kv_heads, dim=0).flatten().nonzero().squeeze(1),
        splits=_Splits(owner, number, int(counts.max())) if size < most else None,
    )


def _plan_chunk(
    i: int, metadata: AttentionMetadata, cache: torch.Tensor, dtype: torch.dtype, window: int | None, buffers: _Buffers
) -> _ChunkPlan:
    """Sequence i alone: its queries are its last tokens; pages behind the first query's window are left out."""
    page = cache.shape[2]
    length, queries = metadata.context_lens_cpu[i], metadata.query_lens_cpu[i]
    first = max(length - queries - window + 1, 0) // page if window is not None else 0
    pages = _Pages.build(metadata.block_table[i : i + 1, first : -(-length // page)], cache, buffers)
    if queries == length and (window is None or window >= length):
        return _ChunkPlan(pages, None)  # no prefix: plain causal attention
    position = torch.arange(length - queries, length, device=cache.device)[:, None]
    key = torch.arange(first * page, length, device=cache.device)
    hidden = key > position
    if window is not None:
        hidden |= key <= position - window
    return _ChunkPlan(pages, _bias(hidden, dtype))


def _bias(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """-inf where hidden, else 0."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
