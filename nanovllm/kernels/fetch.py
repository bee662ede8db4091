"""Inputs of a decode step, read by the GPU itself from the host's pinned memory.

A step's graph begins with this kernel. A copy in front of the graph would cost the device some 6 µs a step, at batch 1
one in a hundred; a kernel pays one trip over the bus, and brings only the rows and pages that its graph can use.

The host writes its steps into slots in turn. Which one is meant the device counts for itself, for a graph's arguments
never change: `turn`, int64 [2], holds the slot of the next step and that of the step that runs. The kernel here notes
the first as the second; the one that ends a step (`kernels.sample`) advances the first.
Grid: a program a row. Traffic: what is copied, once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nanovllm.kernels import reference
from nanovllm.kernels.jit import jit, use_triton
from nanovllm.kernels.launch_config import next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl


@jit(do_not_specialize=("width", "table_stride", "slot_numbers", "slot_lengths", "slot_table"))
def _fetch_kernel(
    turn, from_numbers, from_lengths, from_table, numbers, lengths, table,
    slot_numbers, slot_lengths, slot_table, numbers_stride, table_stride, width,
    COUNT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program r copies row r; slot_…: elements from one slot to the next. Its dependents start when it has ended:
    some of them read what it writes before they wait for anything."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(turn)
    kind = tl.arange(0, BLOCK_C)
    place = kind * numbers_stride + row
    number = tl.load(from_numbers + slot * slot_numbers + place, mask=kind < COUNT)
    length = tl.load(from_lengths + slot * slot_lengths + row)
    source = from_table + slot * slot_table + row * table_stride
    for start in range(0, width, BLOCK):
        page = start + tl.arange(0, BLOCK)
        block = tl.load(source + page, mask=page < width)
        tl.store(table + row * table_stride + page, block, mask=page < width)
    tl.store(numbers + place, number, mask=kind < COUNT)
    tl.store(lengths + row, length)
    if row == 0:
        tl.store(turn + 1, slot)


def fetch_step_(
    turn: torch.Tensor,
    source: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    target: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rows: int,
    width: int,
) -> None:
    """Copy the first `rows` rows of slot turn[0] from `source` into `target`, and note the slot in turn[1].

    turn: int64 [2]. target: numbers int64 [C, R], lengths int32 [R], block table int32 [R, W], of which the first
    `width` columns are copied; source: the same with the slots in front, in pinned memory, with the target's strides.
    """
    numbers, lengths, table = target
    if not use_triton(turn):
        return reference.fetch_step_(turn, source, target, rows, width)
    for name, there, here in zip(("numbers", "lengths", "table"), source, target, strict=True):
        if there.shape[1:] != here.shape or there.stride()[1:] != here.stride() or there.dtype != here.dtype:
            raise ValueError(
                f"{name} must be alike on both sides, got {there.dtype} {tuple(there.shape[1:])} with strides "
                f"{there.stride()[1:]} and {here.dtype} {tuple(here.shape)} with strides {here.stride()}"
            )
    _fetch_kernel[(rows,)](
        turn, *source, *target, *(tensor.stride(0) for tensor in source), numbers.stride(0), table.stride(0), width,
        COUNT=numbers.shape[0], BLOCK_C=next_power_of_2(numbers.shape[0]), BLOCK=min(next_power_of_2(width), 1024),
        num_warps=4,
    )  # fmt: skip
