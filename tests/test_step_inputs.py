"""What a decode graph takes from the host and sends there: `fetch_step_` at its start, the echo at its end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanovllm.engine.batch import ScheduledBatch, ScheduledSequence
from nanovllm.engine.input_builder import InputBuilder
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels.fetch import fetch_step_
from nanovllm.kernels.sample import TokenSink, sample

SLOTS, ROWS, WIDTH = 2, 5, 40
interpret, gpu = pytest.mark.interpret, pytest.mark.gpu
kernel_devices = [pytest.param("cpu", marks=interpret, id="interpret"), pytest.param("cuda", marks=gpu, id="gpu")]


def pinned(tensor: torch.Tensor, device: str) -> torch.Tensor:
    return tensor.pin_memory() if device == "cuda" else tensor


def published(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers, lengths and table of both slots; every value is another one."""
    sizes = (3, ROWS), (ROWS,), (ROWS, WIDTH)
    dtypes = torch.int64, torch.int32, torch.int32
    made = []
    for number, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True), start=1):
        values = torch.arange(SLOTS * torch.Size(size).numel(), dtype=dtype) + number * 1000
        made.append(pinned(values.view(SLOTS, *size), device))
    return made[0], made[1], made[2]


@pytest.mark.parametrize("device", ["cpu", *kernel_devices])
@pytest.mark.parametrize(("slot", "rows", "width"), [(0, 1, 1), (1, 3, 33), (0, ROWS, WIDTH)])
def test_a_step_fetches_its_rows_of_the_slot_whose_turn_it_is(device: str, slot: int, rows: int, width: int) -> None:
    source = published(device)
    numbers, lengths, table = (torch.full_like(part[0], -7, device=device) for part in source)
    turn = torch.tensor([slot, -1], device=device)
    fetch_step_(turn, source, (numbers, lengths, table), rows, width)
    expected: list[Any] = [torch.full_like(part[0], -7) for part in source]
    expected[0][:, :rows] = source[0][slot, :, :rows]
    expected[1][:rows] = source[1][slot, :rows]
    expected[2][:rows, :width] = source[2][slot, :rows, :width]
    for got, wanted in zip((numbers, lengths, table), expected, strict=True):
        assert torch.equal(got.cpu(), wanted)
    assert turn.tolist() == [slot, slot]


def test_an_interrupted_row_of_the_table_is_written_anew() -> None:
    """The row was another sequence's, with more blocks; the interrupt comes before the new one's are in it."""

    def decode(seq_id: int, blocks: list[int]) -> ScheduledBatch:
        seq = Sequence(seq_id, "request", [7] * (8 * len(blocks)), max_tokens=5)
        item = ScheduledSequence(seq, len(seq.token_ids) - 1, 1, True, True, 0, blocks)
        return ScheduledBatch((item,), 1, 1, 1)

    class Interrupted(list[int]):
        def __getitem__(self, part: Any) -> Any:
            raise KeyboardInterrupt

    inputs = InputBuilder(1, 32, 64, 8, torch.device("cpu"))
    inputs.build_decode(decode(1, [1, 2, 3]), 1)
    with pytest.raises(KeyboardInterrupt):
        inputs.build_decode(decode(2, Interrupted([4, 5])), 1)
    table = inputs.build_decode(decode(2, [4, 5]), 1).attention.block_table
    assert table[0, :2].tolist() == [4, 5]


@pytest.mark.parametrize("device", kernel_devices)
def test_both_sides_must_be_laid_out_alike(device: str) -> None:
    source = published(device)
    target = tuple(part[0].to(device) for part in source)
    with pytest.raises(ValueError, match="table must be alike on both sides"):
        fetch_step_(torch.zeros(2, dtype=torch.int64, device=device), source, (*target[:2], target[2].T), 1, 1)


@pytest.mark.parametrize("device", kernel_devices)
def test_tokens_are_echoed_in_the_slots_in_turn(device: str) -> None:
    """Each step writes its tokens into its own slot and hands the turn on; the other slot keeps the step before."""
    echo = pinned(torch.full((SLOTS, 8), -1), device)
    turn = torch.tensor([0, -1], device=device)
    tokens = torch.zeros(8, dtype=torch.int64, device=device)
    source = published(device)
    target = tuple(torch.zeros_like(part[0], device=device) for part in source)
    zeros = torch.zeros(ROWS, dtype=torch.int64, device=device)
    logits = torch.zeros(ROWS, 300, device=device)
    for step in range(5):
        before = echo.clone()
        fetch_step_(turn, source, target, ROWS, WIDTH)  # type: ignore[arg-type]
        wanted = [(7 * step + row) % 300 for row in range(ROWS)]
        logits.zero_()
        logits[torch.arange(ROWS), torch.tensor(wanted)] = 1.0
        sample(logits, zeros.float(), zeros, zeros, sink=TokenSink(tokens, echo, turn))
        if device == "cuda":
            torch.cuda.synchronize()
        slot = step % SLOTS
        assert echo[slot].tolist() == wanted + [-1] * (8 - ROWS)
        assert torch.equal(echo[1 - slot], before[1 - slot])
        assert tokens[:ROWS].tolist() == wanted
        assert turn.tolist() == [1 - slot, slot]
