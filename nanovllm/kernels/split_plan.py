"""Which keys of which sequence each attention program of a decode step reads: made once a step, used by every layer.

A launch has a fixed number of slots for each KV head, so that one CUDA graph serves all lengths. All splits get the
same length, the shortest for which the slots suffice; so a long sequence takes the slots that short ones leave. With a
fixed number for each, six sequences, one of 16,384 tokens and five of 256, took 138 us a layer, and 51 so (H100,
Qwen3-0.6B, 2026-11-26). FlashInfer plans on the host; here the graph's first kernels bring the lengths to the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nanovllm.kernels.jit import gpu_of, jit, use_triton
from nanovllm.kernels.launch_config import DecodeConfig, Gpu, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """`config`, and what `plan_splits` made of it: None where there is nothing to share out.

    slots: [S, 4] int32: sequence (-1 = nothing to do), first tile, end (a key), and context of the sequence.
    parts: [B, 2] int32: a sequence's first slot, and how many it has.
    """

    config: DecodeConfig
    slots: torch.Tensor | None = None
    parts: torch.Tensor | None = None

    @property
    def unshared(self) -> int:
        """SPLITS of the kernels, a constant they compute with: programs of a sequence where nothing is shared out."""
        return self.config.splits if self.slots is None else 1


@jit()
def first_key(context, window, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the first tile starts: 0, or the tile that holds the oldest visible key."""
    first = context * 0  # of one context or of many
    if HAS_WINDOW:
        first = tl.maximum(context - window, 0) // BLOCK_N * BLOCK_N
    return first


@jit()
def split_length(span, min_split, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys of a split where nothing is shared: at least min_split, whole tiles, few enough splits."""
    return tl.cdiv(tl.maximum(tl.cdiv(span, SPLITS), min_split), BLOCK_N) * BLOCK_N


@jit()
def slot_keys(
    plan, context_lens, slot, window, min_split, SPLITS: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Sequence (negative if none), first key, end and context of a slot. Without a plan either SPLITS is 1, and a slot
    a sequence, or all slots are one sequence's."""
    if plan is not None:
        sequence = tl.load(plan + 4 * slot)
        begin = tl.load(plan + 4 * slot + 1) * BLOCK_N  # the compiler sees a multiple
        end = tl.load(plan + 4 * slot + 2)
        context = tl.load(plan + 4 * slot + 3)
    else:
        sequence = slot // SPLITS
        context = tl.load(context_lens + sequence)
        # Plus nothing, which the compiler must not see: a loop that starts at a known 0 comes out 2 % slower.
        begin = first_key(context, window, HAS_WINDOW, BLOCK_N) + tl.program_id(1) * BLOCK_N
        end = context
        if SPLITS > 1:
            length = split_length(context - begin, min_split, SPLITS, BLOCK_N)
            begin += slot * length
            end = tl.minimum(begin + length, context)
            sequence = tl.where((slot > 0) & (begin >= context), -1, 0)
    return sequence, begin, end, context


@jit(do_not_specialize=("num_seqs", "spare", "window", "min_split", "keep_whole"), unaligned=("context_lens",))
def _plan_kernel(
    context_lens, slots, parts, num_seqs, spare, window, min_split, keep_whole,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """One program: searches the shortest split, in tiles, for which the slots suffice.

    But none shorter than `keep_whole` times the mean length: sequences of similar length stay whole.
    """
    sequence = tl.arange(0, BLOCK_B)
    inside = sequence < num_seqs
    context = tl.load(context_lens + sequence, mask=inside, other=0)
    first = first_key(context, window, HAS_WINDOW, BLOCK_N)
    tiles = tl.cdiv(context - first, BLOCK_N)
    total = tl.sum(tiles, axis=0)
    shortest = tl.maximum(tl.cdiv(total, num_seqs + spare), min_split // BLOCK_N)
    shortest = tl.maximum(shortest, tl.cdiv(total * keep_whole, num_seqs))
    # Long enough: a sequence needs at most 1 + (tiles - 1) / length slots.
    longest = tl.maximum(tl.cdiv(tl.sum(tl.maximum(tiles - 1, 0), axis=0), spare), shortest)
    while shortest < longest:
        length = (shortest + longest) // 2
        needed = tl.sum(tl.where(inside, tl.maximum(tl.cdiv(tiles, length), 1), 0), axis=0)
        longest = tl.where(needed <= num_seqs + spare, length, longest)
        shortest = tl.where(needed <= num_seqs + spare, shortest, length + 1)
    splits = tl.where(inside, tl.maximum(tl.cdiv(tiles, longest), 1), 0)
    start = tl.cumsum(splits, axis=0) - splits
    tl.store(parts + 2 * sequence, start, mask=inside)
    tl.store(parts + 2 * sequence + 1, splits, mask=inside)
    for split in range(0, tl.max(splits, axis=0)):
        place = slots + 4 * (start + split)
        begin = first // BLOCK_N + split * longest
        tl.store(place, sequence, mask=split < splits)
        tl.store(place + 1, begin, mask=split < splits)
        tl.store(place + 2, tl.minimum((begin + longest) * BLOCK_N, context), mask=split < splits)
        tl.store(place + 3, context, mask=split < splits)
    for rest in range(tl.sum(splits, axis=0), num_seqs + spare, BLOCK_B):
        tl.store(slots + 4 * (rest + sequence), -1, mask=rest + sequence < num_seqs + spare)


def plan_splits(context_lens: torch.Tensor, config: DecodeConfig, window: int | None = None) -> SplitPlan:
    """The plan of sequences that read the last `window` (None = all) of their `context_lens` [B] int32 keys."""
    num_seqs = context_lens.shape[0]
    slots = config.slots(num_seqs)
    if num_seqs == 1 or slots == num_seqs or not use_triton(context_lens):
        return SplitPlan(config)
    plan = SplitPlan(config, context_lens.new_empty((slots, 4)), context_lens.new_empty((num_seqs, 2)))
    block = max(16, next_power_of_2(num_seqs))
    _plan_kernel[(1,)](
        context_lens, plan.slots, plan.parts, num_seqs, slots - num_seqs, window or 0, config.min_split,
        config.keep_whole, BLOCK_B=block, BLOCK_N=config.block_n, HAS_WINDOW=window is not None,
        num_warps=max(block // 128, 1),
    )  # fmt: skip
    return plan


def plan_step(
    policy: Callable[[int, int, int, int, int, Gpu], DecodeConfig],
    k_cache: torch.Tensor,
    context_lens: torch.Tensor,
    max_context_len: int,
    window: int | None,
) -> SplitPlan:
    """By a policy of `launch_config`: the plan of all layers with this window and a k_cache [blocks, Hkv, page, D]."""
    _, kv_heads, page, dim = k_cache.shape
    longest, gpu = longest_span(max_context_len, window, page), gpu_of(k_cache.device)
    config = policy(context_lens.shape[0], kv_heads, dim, k_cache.element_size(), longest, gpu)
    return plan_splits(context_lens, config, window)


def longest_span(max_context_len: int, window: int | None, page: int) -> int:
    """Bound on the keys that one sequence reads."""
    return max_context_len if window is None else min(max_context_len, window + page)
