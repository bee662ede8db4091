"""Variants that take turns, and what is said about their times: the part of measuring that needs no device.

A clock that drifts, a GPU that grows warm and a neighbour that wakes up meet all variants alike when they run in turn,
and none of them in particular when each runs its share at once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def in_turns(variants: Mapping[str, Callable[[int], T]], rounds: int, *, balanced: bool = False) -> dict[str, list[T]]:
    """What each variant returned in rounds 0 to `rounds` - 1, every round going through all, back and forth.

    `balanced`: each is equally often at every place and behind every other instead. Back and forth, a variant has the
    same two neighbours for ever, and whoever follows one that let the GPU cool gets a faster clock.
    A variant is called with the number of the round.
    """
    names = list(variants)
    orders = balanced_orders(len(names)) if balanced else [list(range(len(names))), list(range(len(names)))[::-1]]
    found: dict[str, list[T]] = {name: [] for name in names}
    for turn in range(rounds):
        for i in orders[turn % len(orders)]:
            found[names[i]].append(variants[names[i]](turn))
    return found


def balanced_orders(count: int) -> list[list[int]]:
    """Orders of `count` things in which each has every place, and every other in front of it, equally often.

    Rows of a Williams square (E. J. Williams, 1949): 0, 1, n - 1, 2, n - 2, ... plus a constant; of an odd number
    also their mirror images.
    """
    first = [(i + 1) // 2 if i % 2 else -(i // 2) % count for i in range(count)]
    rows = [[(i + shift) % count for i in first] for shift in range(count)]
    return rows if count % 2 == 0 else [order for row in rows for order in (row, row[::-1])]


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of one value or more, interpolated and never outside of them."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), low, high


def take_turns(replays: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What `rounds` turns of each took, in balanced orders. One more goes before and does not count: it warms up."""

    def ignoring_turn(replay: Callable[[], float]) -> Callable[[int], float]:
        return lambda turn: replay()

    times = in_turns({name: ignoring_turn(replay) for name, replay in replays.items()}, rounds + 1, balanced=True)
    return {name: values[1:] for name, values in times.items()}


def times_as_fast(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the turns of theirs / ours. A clock that steps between two turns changes both sides of each ratio;
    it can leave two medians on either side of the step."""
    return statistics.median(their / our for our, their in zip(ours, theirs, strict=True))
