"""Variants that take turns, and what is said about their times: the part of measuring that needs no device.

A clock that drifts, a GPU that grows warm and a neighbour that wakes up meet all variants alike when they run in turn,
and none of them in particular when each runs its share at once.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def in_turns(
    variants: Mapping[str, Callable[[int], T]], rounds: int, *, shuffled: bool = False
) -> dict[str, list[T]]:
    """What each variant returned in rounds 0 to `rounds` - 1, every round going through all, back and forth.

    `shuffled`: in an order of its own instead, the same in every run. Back and forth, a variant has the same two
    neighbours for ever, and whoever follows one that let the GPU cool gets a faster clock.
    A variant is called with the number of the round.
    """
    found: dict[str, list[T]] = {name: [] for name in variants}
    for turn in range(rounds):
        order = list(variants)[:: -1 if turn % 2 else 1]
        if shuffled:
            random.Random(turn).shuffle(order)
        for name in order:
            found[name].append(variants[name](turn))
    return found


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of one value or more, interpolated and never outside of them."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), low, high


def take_turns(replays: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, tuple[float, float, float]]:
    """`percentiles` of `rounds` turns of each, shuffled; one more turn goes before and does not count: it warms up."""

    def ignoring_turn(replay: Callable[[], float]) -> Callable[[int], float]:
        return lambda turn: replay()

    times = in_turns({name: ignoring_turn(replay) for name, replay in replays.items()}, rounds + 1, shuffled=True)
    return {name: percentiles(values[1:]) for name, values in times.items()}
