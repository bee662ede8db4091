"""Rows of `metrics.csv` as lines to draw: one line an engine and its options, points sorted, names for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from harness.records import Record

OURS = "nanovllm"
_NAMES = {"nanovllm": "nano-vllm-coconut", "vllm": "vLLM", "nano-vllm": "nano-vLLM", "transformers": "transformers"}
_OPTIONS = {"": "", "fusion=auto": "fused", "fusion=on": "fused (forced)", "fusion=off": "unfused"}


@dataclass(frozen=True)
class Line:
    """One engine's values over a number: batch size or prompt length."""

    label: str
    engine: str
    points: tuple[tuple[float, float], ...]

    @property
    def ours(self) -> bool:
        """Whether this engine is the one that the plots are about."""
        return self.engine == OURS


def engine_label(record: Record) -> str:
    """ "vLLM 0.26.0", "nano-vllm-coconut, unfused"."""
    name = _NAMES.get(record.engine, record.engine)
    version = f" {record.version}" if record.engine != OURS and record.version else ""
    options = _OPTIONS.get(record.options, record.options)
    return f"{name}{version}" + (f", {options}" if options else "")


def current(records: Sequence[Record]) -> list[Record]:
    """The rows without those of an earlier engine of ours: only the newest row's commit or day stay, and its models.

    Of another engine the rows of its newest day stay, for each model: a line must not mix runs.
    """
    ours = [r for r in records if r.engine == OURS]
    if not ours:
        return list(records)
    newest = max(ours, key=lambda r: r.date)
    kept = [r for r in ours if r.commit == newest.commit or r.date == newest.date]
    models = {r.model for r in kept}
    days: dict[tuple[str, str], str] = defaultdict(str)
    for r in records:
        days[r.engine, r.model] = max(days[r.engine, r.model], r.date)
    return [
        r
        for r in records
        if r.model in models and (r in kept if r.engine == OURS else r.date == days[r.engine, r.model])
    ]


def lines(records: Sequence[Record], field: str) -> list[Line]:
    """Lines over `field` ("batch" or "prompt"), ours first; the newest row wins where two name the same point.

    Lines of ours that have no commit in common are of different engines: their labels name the commits.
    """
    found: dict[tuple[bool, str, str], dict[float, Record]] = defaultdict(dict)
    for record in sorted(records, key=lambda r: r.date):
        at = getattr(record, field)
        if at.isdigit():
            found[record.engine != OURS, record.engine, engine_label(record)][float(at)] = record
    commits = [{r.commit for r in points.values()} for (_, engine, _), points in found.items() if engine == OURS]
    apart = len(commits) > 1 and not set.intersection(*commits)

    def named(engine: str, label: str, points: dict[float, Record]) -> str:
        commit = ", ".join(sorted({r.commit for r in points.values()}))
        return f"{label} ({commit})" if apart and engine == OURS else label

    return [
        Line(named(engine, label, points), engine, tuple((x, points[x].value) for x in sorted(points)))
        for (_, engine, label), points in sorted(found.items())
    ]


def gpus(records: Sequence[Record]) -> list[str]:
    """Devices that are GPUs, those with the newest rows first."""
    newest: dict[str, str] = {}
    for record in records:
        if "NVIDIA" in record.device or "AMD Instinct" in record.device:
            newest[record.device] = max(record.date, newest.get(record.device, ""))
    return sorted(newest, key=lambda device: (newest[device], device), reverse=True)


def slug(device: str) -> str:
    """A device as part of a file name: "NVIDIA H100 80GB HBM3" -> "h100-80gb-hbm3"."""
    return device.removeprefix("NVIDIA ").lower().replace(" ", "-").replace("/", "-")


def caption(records: Sequence[Record]) -> str:
    """Device, dtype, weights, versions, dates and commits of our rows; the dates of the others'."""
    ours = [r for r in records if r.engine == OURS] or list(records)

    def each(values: set[str]) -> str:
        return ", ".join(sorted(values - {""}))

    weights = {f"{w} weights" for w in (r.weights for r in ours) if w}
    versions = [f"torch {each({r.torch for r in ours})}", f"Triton {each({r.triton for r in ours})}"]
    what = [each({r.device for r in records}), each({r.dtype for r in ours}), each(weights)]
    when = f"commit {each({r.commit for r in ours})}, {each({r.date for r in ours})}"
    peers: dict[str, set[str]] = {}
    for r in records:
        if r not in ours:
            peers.setdefault(_NAMES.get(r.engine, r.engine), set()).add(r.date)
    others = [f"{name} {each(dates)}" for name, dates in sorted(peers.items())]
    return "; ".join([", ".join(w for w in what if w), ", ".join(versions), when, *others])
