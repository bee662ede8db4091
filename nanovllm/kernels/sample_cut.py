"""Top-k, top-p and min-p without a sort: the smallest logit that a row keeps, in two launches; and `sample_rows`.

What is kept: `sample_reference.cut_threshold`. How the threshold is found:

`_summary_kernel`, a program for eight groups of 128 columns, writes each group's largest logit and its sum of shares,
exp((logit - largest) / temperature). One read of the logits; nothing for rows without a cut.
`_threshold_kernel`, a program a row, needs of the row only what may lie near the threshold:
  1. A first guess: the k-th largest of the groups' maxima (the 64th for top-p). At least k logits reach it, and seldom
     many more, since large logits rarely share a group.
  2. Gather the logits from the guess up into a list; only groups whose maximum reaches the guess are read. Their number
     and their sum of shares tell whether the threshold is among them. If not, or if they are more than the list
     holds, narrow the interval and gather again: a flat distribution, with a nucleus of many thousand tokens, takes
     some passes over the row, one with a few hundred takes one or two.
  3. Bisect in the list, held in registers, on the bits of the float.
Shares are summed as 64-bit integers, in units of 2**-40 of the largest, so no order of summation, number of rows or
launch config changes a threshold; for the same reason no launch config is tuned here.
Shapes are static and nothing is read back to the host, so a CUDA graph can hold it. Related: Qrita (pivots and a
truncation, vLLM's `topk_topp_triton.py`), FlashInfer's `top_k_renorm` (pivots); both pass over the row several times.

Traffic: one read of the logits [R, V], 8 bytes a group, and the groups that reach the guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nanovllm.kernels import sample_reference
from nanovllm.kernels.jit import gpu_of, jit, require_unit_stride, use_triton
from nanovllm.kernels.sample import TokenSink, sample

if TYPE_CHECKING:
    import triton.language as tl

GROUP = 128  # columns a group
MAX_VOCAB = 2**19  # sums of shares fit into 59 bits, and one program's registers hold the groups' maxima
CAPACITY = 4096  # logits that the list of a row holds


@jit()
def _key(x):
    """An int64 that orders float32 as their values do; one and the same for -0.0 and 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@jit()
def _value(key):
    """The inverse of `_key`. The key above infinity's is a NaN, which no logit reaches."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit()
def _units(share):
    """A share, 0 to 1 (or a sum of 128 of them), in units of 2**-40."""
    return (share * 1099511627776.0).to(tl.int64)


@jit()
def _share(x, top, inverse):
    """exp((x - top) / temperature), and 1 for the top itself, infinite or not."""
    return tl.where(x == top, 1.0, tl.exp((x - top) * inverse))


@jit()
def _load_cut(temperature, top_k, top_p, min_p, row, vocab):
    """A row's temperature, k (0 for none), p, min-p, and whether it is cut at all."""
    heat = tl.load(temperature + row)
    k = tl.load(top_k + row).to(tl.int32)
    k = tl.where(k < vocab, k, 0)
    p = tl.load(top_p + row)
    floor = tl.load(min_p + row)
    return heat, k, p, floor, (heat > 0.0) & ((k > 0) | (p < 1.0) | (floor > 0.0))


@jit(unaligned=("temperature", "top_k", "top_p", "min_p"))
def _summary_kernel(
    logits, temperature, top_k, top_p, min_p, tops, sums, row_stride, vocab, groups,
    TILE: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a (row, TILE groups). tops, sums: float32 [R, groups]; see `_share`."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    heat, k, p, floor, is_cut = _load_cut(temperature, top_k, top_p, min_p, row, vocab)
    if is_cut:
        inverse = tl.div_rn(1.0, heat)
        group = tl.program_id(1) * TILE + tl.arange(0, TILE)
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = tl.load(logits + row * row_stride + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        x = tl.where(x == x, x, float("-inf"))
        top = tl.max(x, axis=1)
        tl.store(tops + row * groups + group, top, mask=group < groups)
        tl.store(sums + row * groups + group, tl.sum(_share(x, top[:, None], inverse), axis=1), mask=group < groups)


@jit()
def _largest_key(x, weight, target, low, high):
    """The largest key in [low, high) which x of `target` weight in all reach; `low` if there is none."""
    while high - low > 1:
        middle = low + ((high - low) >> 1)
        enough = tl.sum(tl.where(x >= _value(middle), weight, 0), axis=0) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@jit()
def _gather(
    logits, ids, kept, tops, top, inverse, low, high, vocab,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """List a row's logits with keys in [low, high), without -inf, in `kept`; the list is cut off at CAPACITY.

    ids: [GROUPS], room for the list of groups. tops: the groups' maxima, in registers. Returns of all logits in the
    interval their number, the sum of their shares, the smallest and the largest.
    """
    bottom, above = _value(low), _value(high)
    wanted = (tops >= bottom) & (tops > float("-inf"))
    place = tl.cumsum(wanted.to(tl.int32), axis=0) - 1
    num_groups = tl.sum(wanted.to(tl.int32), axis=0)
    # Lists live in global memory that only this program knows; the barriers keep its warps from overtaking each other.
    tl.debug_barrier()
    tl.store(ids + place, tl.arange(0, GROUPS), mask=wanted)
    tl.debug_barrier()
    number = tl.full((), 0, tl.int32)
    units = tl.full((), 0, tl.int64)
    smallest = tl.full((), float("inf"), tl.float32)
    largest = tl.full((), float("-inf"), tl.float32)
    element = tl.arange(0, TILE * GROUP)
    for start in range(0, num_groups, TILE):
        entry = start + element // GROUP
        listed = entry < num_groups
        column = tl.load(ids + entry, mask=listed, other=0) * GROUP + element % GROUP
        x = tl.load(logits + column, mask=listed & (column < vocab), other=float("-inf")).to(tl.float32)
        inside = (x >= bottom) & (x > float("-inf")) & ~(x >= above)
        count = inside.to(tl.int32)
        slot = number + tl.cumsum(count, axis=0) - 1
        tl.store(kept + slot, x, mask=inside & (slot < CAPACITY))
        number += tl.sum(count, axis=0)
        units += tl.sum(tl.where(inside, _units(_share(x, top, inverse)), 0), axis=0)
        smallest = tl.minimum(smallest, tl.min(tl.where(inside, x, float("inf")), axis=0))
        largest = tl.maximum(largest, tl.max(tl.where(inside, x, float("-inf")), axis=0))
    tl.debug_barrier()
    return number, units, smallest, largest


@jit()
def _middle(low, high):
    """A key between, the one of the mean value if there is such a value."""
    mean = _key(_value(low) * 0.5 + _value(high) * 0.5)
    return tl.where((mean > low) & (mean < high), mean, low + ((high - low) >> 1))


@jit()
def _find(
    logits, ids, kept, tops, top, inverse, guess, second, target, vocab, BY_SHARE: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """The largest key that logits of `target` weight in all reach, -inf's if there is none, and their shares' sum.

    Weight is the share with BY_SHARE, else 1. guess: where to look first; second: where if that is too high.
    The answer lies in [low, high) throughout, and logits of less than the target reach `high`.
    """
    bottom = _key(tl.full((), float("-inf"), tl.float32))
    high = _key(top) + 1
    low, probe = bottom, guess
    known = tl.full((), 0, tl.int32)  # whether logits of the target's weight reach `low`
    busy = tl.full((), 1, tl.int32)
    weight_above = tl.full((), 0, tl.int64)  # of logits that reach `high`
    units_above = tl.full((), 0, tl.int64)
    number = tl.full((), 0, tl.int32)  # of logits in the list, or more than it holds if they are equal
    units = tl.full((), 0, tl.int64)  # their sum
    while busy != 0:
        number, found, smallest, largest = _gather(
            logits, ids, kept, tops, top, inverse, probe, high, vocab, GROUPS, GROUP, TILE, CAPACITY
        )
        weight = found
        if not BY_SHARE:
            weight = number.to(tl.int64)
        enough = weight_above + weight >= target
        isolated = (number <= CAPACITY) | (smallest == largest)
        busy = tl.where(enough, (~isolated).to(tl.int32), (probe > bottom).to(tl.int32))
        known = tl.where(enough, 1, known)
        weight_above += tl.where(enough, 0, weight)
        units_above += tl.where(enough, 0, found)
        units = tl.where(enough, found, 0)
        low = tl.where(enough, _key(smallest), low)
        high = tl.where(enough, _key(largest) + 1, probe)
        probe = tl.where(known != 0, _middle(low, high), tl.where(second < high, second, bottom))
    slot = tl.arange(0, CAPACITY)
    x = tl.load(kept + slot, mask=slot < number, other=float("-inf"))
    share = tl.where(slot < number, _units(_share(x, top, inverse)), 0)
    if BY_SHARE:
        key = _largest_key(x, share, target - weight_above, low, high)
    else:
        key = _largest_key(x, (slot < number).to(tl.int64), target - weight_above, low, high)
    reached = tl.sum(tl.where(x >= _value(key), share, 0), axis=0)
    return key, units_above + tl.where(key == low, units, reached)


@jit(unaligned=("temperature", "top_k", "top_p", "min_p", "threshold"))
def _threshold_kernel(
    logits, temperature, top_k, top_p, min_p, tops, sums, ids, kept, threshold, row_stride, vocab, groups,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, CAPACITY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row. tops, sums: [R, groups] of `_summary_kernel`; ids: int32 [R, GROUPS] and kept: float32
    [R, CAPACITY], room for lists; threshold: float32 [R]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    heat, k, p, floor, is_cut = _load_cut(temperature, top_k, top_p, min_p, row, vocab)
    if not is_cut:
        tl.store(threshold + row, float("-inf"))
        return
    inverse = tl.div_rn(1.0, heat)
    group = tl.arange(0, GROUPS)
    inside = group < groups
    top_of = tl.load(tops + row * groups + group, mask=inside, other=float("-inf"))
    top = tl.max(top_of, axis=0)
    logits += row * row_stride
    ids += row * GROUPS
    kept += row * CAPACITY

    bottom = _key(tl.full((), float("-inf"), tl.float32))
    cut, second = bottom, bottom
    if (k > 0) | (p < 1.0):
        # A rank beyond the number of maxima gives -inf. Without k: a nucleus often has less than 64 logits.
        rank = tl.where(k > 0, k, 64)
        guess = _largest_key(top_of, inside.to(tl.int32), rank, bottom, _key(top) + 1)
        if k > 0:
            cut, total = _find(
                logits, ids, kept, top_of, top, inverse, guess, bottom, k.to(tl.int64), vocab,
                False, GROUPS, GROUP, TILE, CAPACITY,
            )  # fmt: skip
            guess = cut
        else:
            sums_of = tl.load(sums + row * groups + group, mask=inside, other=0.0)
            total = tl.sum(_units(sums_of * _share(top_of, top, inverse)), axis=0)
            # Logits so small that all V of them together have less than the share 1 - p are cut.
            spare = (1.0 - p) * (total.to(tl.float32) * 9.094947017729282e-13) / vocab  # 2**-40
            second = _key(top + heat * tl.minimum(tl.log(spare), 0.0))
        if p < 1.0:
            target = tl.maximum(tl.ceil(p.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)
            cut, total = _find(
                logits, ids, kept, top_of, top, inverse, guess, second, target, vocab,
                True, GROUPS, GROUP, TILE, CAPACITY,
            )  # fmt: skip
    result = _value(cut)
    if floor > 0.0:
        result = tl.maximum(result, tl.minimum(top + tl.log(floor) * heat, top))
    tl.store(threshold + row, result)


@dataclass(frozen=True, slots=True)
class CutWorkspace:
    """Memory for the cuts of up to R rows, for callers that allocate first; 34 KiB a row of 151,936 logits."""

    tops: torch.Tensor  # float32 [R, groups]
    sums: torch.Tensor  # float32 [R, groups]
    ids: torch.Tensor  # int32 [R, groups rounded up to a power of two]
    kept: torch.Tensor  # float32 [R, CAPACITY]
    threshold: torch.Tensor  # float32 [R], the result

    @classmethod
    def allocate(cls, num_rows: int, vocab_size: int, device: torch.device) -> CutWorkspace:
        """For `num_rows` rows of `vocab_size` logits. Raises ValueError above `MAX_VOCAB`."""
        if vocab_size > MAX_VOCAB:
            raise ValueError(f"top-k, top-p and min-p are limited to {MAX_VOCAB} logits a row, got {vocab_size}")
        groups = -(-vocab_size // GROUP)
        return cls(
            tops=torch.empty(num_rows, groups, dtype=torch.float32, device=device),
            sums=torch.empty(num_rows, groups, dtype=torch.float32, device=device),
            ids=torch.empty(num_rows, 1 << (groups - 1).bit_length(), dtype=torch.int32, device=device),
            kept=torch.empty(num_rows, CAPACITY, dtype=torch.float32, device=device),
            threshold=torch.empty(num_rows, dtype=torch.float32, device=device),
        )


def cut_threshold(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    *,
    workspace: CutWorkspace | None = None,
) -> torch.Tensor:
    """The logit below which top-k, top-p and min-p exclude a token, float32 [R]; -inf where nothing is excluded.

    logits: [R, V], any float dtype, rows may be strided, V up to `MAX_VOCAB` in the kernel; temperature, top_p, min_p:
    float32 [R]; top_k: int32 or int64 [R]; their meaning: `sample_reference.cut_threshold`. The result is the smallest
    logit kept, or min-p's limit if that is larger; with `workspace` it lies in there. Two launches, asynchronous on
    CUDA; those of rows with temperature 0 or without cuts end at once. Raises ValueError for shapes that do not match.
    """
    rows, vocab = logits.shape
    vectors = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for name, tensor in vectors.items():
        if tensor.shape != (rows,):
            raise ValueError(f"{name} must have shape ({rows},) to match logits, got {tuple(tensor.shape)}")
    if rows == 0 or not use_triton(logits):
        return sample_reference.cut_threshold(logits, temperature, top_k, top_p, min_p)
    require_unit_stride(logits=logits, **vectors)
    work = workspace or CutWorkspace.allocate(rows, vocab, logits.device)
    groups = -(-vocab // GROUP)
    if work.threshold.shape[0] < rows or work.tops.shape[1] != groups:
        raise ValueError(
            f"workspace was allocated for {work.threshold.shape[0]} rows of {work.tops.shape[1]} groups: "
            f"allocate it for at least {rows} rows and {vocab} logits"
        )
    parameters = (temperature, top_k, top_p, min_p, work.tops, work.sums)
    pdl = gpu_of(logits.device).pdl
    dependent = {"launch_pdl": True} if pdl else {}
    _summary_kernel[(rows, -(-groups // 8))](
        logits, *parameters, logits.stride(0), vocab, groups, TILE=8, GROUP=GROUP, PDL=pdl, num_warps=4, **dependent
    )
    _threshold_kernel[(rows,)](
        logits, *parameters, work.ids, work.kept, work.threshold, logits.stride(0), vocab, groups,
        GROUPS=work.ids.shape[1], GROUP=GROUP, TILE=64, CAPACITY=CAPACITY, PDL=pdl, num_warps=16, **dependent,
    )  # fmt: skip
    return work.threshold[:rows]


@dataclass(frozen=True, slots=True)
class RowParams:
    """How each of R rows is sampled; tensors [R] on the device, which a captured graph reads anew at each replay."""

    temperature: torch.Tensor  # float32, 0 for greedy, else at least 1e-5
    seeds: torch.Tensor  # int64
    positions: torch.Tensor  # int32 or int64, of the token that gave the row
    top_k: torch.Tensor  # int32 or int64, 0 for none
    top_p: torch.Tensor  # float32, 1 for none
    min_p: torch.Tensor  # float32, 0 for none


def sample_rows(
    logits: torch.Tensor, params: RowParams, *, workspace: CutWorkspace | None = None, sink: TokenSink | None = None
) -> torch.Tensor:
    """One token a row, greedy, by temperature or cut, each row as `params` says. Returns int64 [R], in `sink` if given.

    logits: [R, V] as in `cut_threshold` and `sample`. Made to be captured in a CUDA graph: four launches whatever the
    parameters hold, `_summary_kernel`, `_threshold_kernel`, and `sample`'s `_chunk_kernel` and `_pick_kernel`.
    """
    threshold = cut_threshold(logits, params.temperature, params.top_k, params.top_p, params.min_p, workspace=workspace)
    return sample(logits, params.temperature, params.seeds, params.positions, threshold=threshold, sink=sink)
