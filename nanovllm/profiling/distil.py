"""From events to numbers: where the time of a step goes, kernel by kernel and role by role.

With programmatic dependent launch a kernel starts before its predecessor has ended, so durations overlap and their sum
is more than the time that passed. Two quantities do add up to a step: a kernel's *exposed* time, from the latest end
before it (or its own start, if later) to its own end, and the *gap* before it, in which the GPU ran nothing.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from nanovllm.profiling.attribute import ROLES, Place, attribute
from nanovllm.profiling.facts import CASES, Facts, bytes_by_role
from nanovllm.profiling.ncu import Counted, count
from nanovllm.profiling.recording import Recording
from nanovllm.profiling.trace import LABELS, WINDOW, Event, Labelled, Range, labelled, split_steps, window


@dataclass(frozen=True, slots=True)
class Placed:
    """An event with its place and its share of the step, in ns."""

    event: Event
    place: Place
    gap: int
    exposed: int


@dataclass(frozen=True, slots=True)
class Step:
    """One step, from `begin` (the end of the step before, or its request) to the end of its last event."""

    begin: int
    end: int
    placed: tuple[Placed, ...]

    @property
    def period(self) -> int:
        """Nanoseconds of the step, host included."""
        return self.end - self.begin

    @property
    def idle(self) -> int:
        """Nanoseconds in which the GPU ran nothing."""
        return sum(p.gap for p in self.placed)


@dataclass(frozen=True, slots=True)
class Row:
    """Totals of a kernel or a role: microseconds and counts are means per step."""

    name: str
    role: str
    calls: float
    total_us: float
    mean_us: float  # of one call
    min_us: float
    exposed_us: float
    gap_us: float
    share: float  # of the step's period: exposed and gap
    gb_s: float | None = None  # bytes over exposed time and gap


@dataclass(frozen=True, slots=True)
class Profile:
    """Everything a report needs about one run."""

    facts: Facts
    source: str
    steps: tuple[Step, ...]
    median: Step  # a real step: the one of median period among those with the commonest kernels
    kernels: tuple[Row, ...]
    roles: tuple[Row, ...]
    layers_found: bool
    counted: tuple[Counted, ...] = ()
    why_not_counted: str = ""  # "" also when nobody asked

    @property
    def period_us(self) -> float:
        """Median step, host included."""
        return self.median.period / 1e3

    @property
    def mean_period_us(self) -> float:
        """Mean over all steps; the rows add up to it."""
        return statistics.fmean(s.period for s in self.steps) / 1e3

    @property
    def idle_share(self) -> float:
        """Share of the recorded time in which the GPU ran nothing."""
        return sum(s.idle for s in self.steps) / max(1, sum(s.period for s in self.steps))

    @property
    def kernels_per_step(self) -> float:
        """Kernels of a step, copies not counted."""
        return statistics.fmean(sum(p.event.kind == "kernel" for p in s.placed) for s in self.steps)

    @property
    def gb_s(self) -> float | None:
        """Known bytes of a step over its mean period; None where the KV that it reads is not known."""
        known = bytes_by_role(self.facts)
        names = {row.name for row in self.roles}
        if "attention" not in known:
            return None
        return sum(b for role, b in known.items() if role in names) / self.mean_period_us / 1e3


def exposed_and_gaps(events: Sequence[Event], begin: int) -> list[tuple[int, int]]:
    """(exposed, gap) in ns of events in order of start; together they sum to the last end minus `begin`.

    What overlaps with everything before it is exposed for 0 ns.
    """
    result, front = [], begin
    for event in events:
        gap = max(0, event.start - front)
        end = max(front + gap, event.end)
        result.append((end - front - gap, gap))
        front = end
    return result


def make_steps(
    parts: Sequence[tuple[Range, list[Event]]], num_layers: int, isolated: bool, labels: Sequence[Labelled] = ()
) -> tuple[list[Step], bool]:
    """Steps with placed events, and whether layers were found in any.

    Back-to-back steps begin where the one before ended, so that the host's time between them counts; the first has
    no such begin and is left out when there are more. Isolated ones begin with their range.
    """
    known: dict[tuple[str, ...], list[Place]] = {}
    steps, previous, layered = [], None, False
    for span, events in parts:
        begin = span.start if isolated else events[0].start if previous is None else previous
        kernels = tuple(e.name for e in events if e.kind == "kernel")
        if kernels not in known:
            known[kernels] = attribute(kernels, num_layers, labels)
        layered = layered or any(place.layer is not None for place in known[kernels])
        kernel_places = iter(known[kernels])
        placed = tuple(
            Placed(event, next(kernel_places) if event.kind == "kernel" else Place(None, "copy"), gap, exposed)
            for event, (exposed, gap) in zip(events, exposed_and_gaps(events, begin), strict=True)
        )
        end = max(begin, max(e.end for e in events))
        if previous is not None or isolated or len(parts) == 1:
            steps.append(Step(begin, end, placed))
        previous = end
    return steps, layered


def representative(steps: Sequence[Step]) -> Step:
    """The step of median period among those that ran the commonest number of kernels."""
    commonest = Counter(len(s.placed) for s in steps).most_common(1)[0][0]
    candidates = sorted((s for s in steps if len(s.placed) == commonest), key=lambda s: s.period)
    return candidates[(len(candidates) - 1) // 2]


def distil(recording: Recording) -> Profile:
    """The profile of one run; ValueError when its trace has no steps."""
    trace, facts = recording.trace, recording.facts
    case = CASES[facts.case]
    parts = split_steps(window(trace, f"{WINDOW} {case.name}"))
    if not parts:
        raise ValueError("no kernel ran inside a recorded step: the profiler lost the GPU's events, record again")
    labels = labelled(trace, f"{LABELS} {case.name}")
    steps, layered = make_steps(parts, facts.num_layers, case.isolated, labels)
    period = sum(s.period for s in steps)
    traffic = bytes_by_role(facts)
    by_kernel: dict[tuple[str, str], list[Placed]] = defaultdict(list)
    by_role: dict[str, list[Placed]] = defaultdict(list)
    for step in steps:
        for placed in step.placed:
            by_kernel[placed.event.name, placed.place.role].append(placed)
            by_role[placed.place.role].append(placed)
    kernels = [_row(name, role, items, len(steps), period) for (name, role), items in by_kernel.items()]
    roles = [
        _row(role, role, by_role[role], len(steps), period, traffic.get(role)) for role in ROLES if role in by_role
    ]
    kernels.sort(key=lambda row: -row.exposed_us)
    counted, why_not = _counted(recording.counters, facts.num_layers, labels)
    median = representative(steps)
    rows = tuple(kernels), tuple(roles)
    return Profile(facts, trace.source, tuple(steps), median, *rows, layered, counted, why_not)


def _counted(counters: str, num_layers: int, labels: Sequence[Labelled]) -> tuple[tuple[Counted, ...], str]:
    """ncu's rows, or why there are none."""
    if not counters.startswith('"ID"'):
        return (), counters
    try:
        return tuple(count(counters, num_layers, labels)), ""
    except ValueError as error:
        return (), str(error)


def _row(name: str, role: str, items: Sequence[Placed], steps: int, period: int, traffic: float | None = None) -> Row:
    durations = [p.event.end - p.event.start for p in items]
    exposed, gap = sum(p.exposed for p in items), sum(p.gap for p in items)
    return Row(
        name, role, len(items) / steps, sum(durations) / steps / 1e3, sum(durations) / len(items) / 1e3,
        min(durations) / 1e3, exposed / steps / 1e3, gap / steps / 1e3, (exposed + gap) / max(1, period),
        None if traffic is None else traffic * steps / max(1, exposed + gap),
    )  # fmt: skip
