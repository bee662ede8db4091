"""What a profiler recorded, as typed events: the same for Nsight Systems (SQLite) and PyTorch's profiler (JSON).

Times are integer nanoseconds on the profiler's own clock; only differences mean something. Knows nothing of models.
Sources: the tables `CUPTI_ACTIVITY_KIND_*`, `NVTX_EVENTS` and `StringIds` of `nsys export -t sqlite`, and the Chrome
trace format that `torch.profiler` exports.
"""

from __future__ import annotations

import gzip
import json
import re
import sqlite3
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WINDOW = "nanovllm.window"  # + " CASE": the range around the steps that count; synchronised on both sides
STEP = "nanovllm.step"  # one range a step, inside the window
LABELS = "nanovllm.labels"  # + " CASE": one step more, its kernels launched inside the ranges of their modules

_FUNCTOR = re.compile(r"\w*(?:Functor|_kernel_cuda|_kernel_impl|Ops?\b)\w*")


@dataclass(frozen=True, slots=True)
class Event:
    """One thing the GPU did: a kernel, a memcpy or a memset."""

    name: str  # short: no return type, arguments or template parameters
    kind: str  # "kernel", "memcpy" or "memset"
    start: int
    end: int
    stream: int = 0
    launched: int | None = None  # when the host asked for it; one time for all nodes of a CUDA graph
    in_graph: bool = False


@dataclass(frozen=True, slots=True)
class Range:
    """A stretch of host time with a name."""

    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Events in order of their start, ranges in order of theirs."""

    source: str  # "nsys" or "torch.profiler"
    events: tuple[Event, ...]
    ranges: tuple[Range, ...] = ()


@dataclass(frozen=True, slots=True)
class Labelled:
    """A kernel's name and the ranges it was launched in, the outermost first."""

    name: str
    ranges: tuple[str, ...]


def short_name(demangled: str) -> str:
    """A kernel's name as people say it; ATen's elementwise kernels keep the functor that tells them apart."""
    text = demangled.removeprefix("void ").replace("(anonymous namespace)::", "").replace("<unnamed>::", "")
    base = re.split(r"[<(]", text, maxsplit=1)[0].strip()
    name = base.rsplit("::", 1)[-1] or text[:60]
    if "at::native" in base:
        functor = next((f for f in _FUNCTOR.findall(text[len(base) :]) if f != name), None)
        return f"{name}<{functor}>" if functor else name
    return name


def read_trace(path: Path) -> Trace:
    """Read a trace by its suffix: .sqlite (nsys) or .json, .json.gz (PyTorch). ValueError if it holds no kernel."""
    trace = read_nsys(path) if path.suffix == ".sqlite" else read_torch(path)
    if not any(event.kind == "kernel" for event in trace.events):
        raise ValueError(f"{path} holds no kernel: profile something that runs on the GPU")
    return trace


def read_nsys(path: Path) -> Trace:
    """The export of `nsys export -t sqlite`. ValueError when the file is something else."""
    if not path.exists():
        raise FileNotFoundError(f"no trace at {path}: run the profiler first")
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            tables = {name for (name,) in db.execute("select name from sqlite_master where type = 'table'")}
            strings = dict(db.execute("select id, value from StringIds"))
            launches = _nsys_launches(db, tables)
            events = _nsys_kernels(db, tables, strings, launches) + _nsys_copies(db, tables, launches)
            ranges = _nsys_ranges(db, tables, strings)
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} is no export of nsys ({error}): make one with `nsys export -t sqlite`") from error
    return _trace("nsys", events, ranges)


def _columns(db: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in db.execute(f"pragma table_info({table})")}


def _nsys_launches(db: sqlite3.Connection, tables: set[str]) -> dict[int, int]:
    """Start of the API call of every correlation id."""
    if "CUPTI_ACTIVITY_KIND_RUNTIME" not in tables:
        return {}
    return dict(db.execute("select correlationId, min(start) from CUPTI_ACTIVITY_KIND_RUNTIME group by 1"))


def _nsys_kernels(
    db: sqlite3.Connection, tables: set[str], strings: dict[int, str], launches: dict[int, int]
) -> list[Event]:
    table = "CUPTI_ACTIVITY_KIND_KERNEL"
    if table not in tables:
        return []
    node = "graphNodeId" if "graphNodeId" in _columns(db, table) else "null"
    names: dict[int, str] = {}
    events = []
    for start, end, stream, correlation, name, graph in db.execute(
        f"select start, end, streamId, correlationId, demangledName, {node} from {table}"
    ):
        if name not in names:
            names[name] = short_name(strings.get(name, "?"))
        events.append(Event(names[name], "kernel", start, end, stream, launches.get(correlation), bool(graph)))
    return events


def _nsys_copies(db: sqlite3.Connection, tables: set[str], launches: dict[int, int]) -> list[Event]:
    events = []
    for kind in ("memcpy", "memset"):
        table = f"CUPTI_ACTIVITY_KIND_{kind.upper()}"
        if table in tables:
            rows = db.execute(f"select start, end, streamId, correlationId from {table}")
            events += [Event(kind, kind, s, e, stream, launches.get(c)) for s, e, stream, c in rows]
    return events


def _nsys_ranges(db: sqlite3.Connection, tables: set[str], strings: dict[int, str]) -> list[Range]:
    if "NVTX_EVENTS" not in tables:
        return []
    rows = db.execute("select text, textId, start, end from NVTX_EVENTS where end is not null")
    return [Range(text or strings.get(ident, ""), start, end) for text, ident, start, end in rows]


def read_torch(path: Path) -> Trace:
    """A Chrome trace of `torch.profiler`, gzipped or not. ValueError when the file is something else."""
    if not path.exists():
        raise FileNotFoundError(f"no trace at {path}: run the profiler first")
    try:
        raw = path.read_bytes()
        items = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)["traceEvents"]
    except (ValueError, KeyError, TypeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no trace of torch.profiler: {error}") from error
    launches = {}
    for item in items:
        if item.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in item.get("args", {}):
            launches[item["args"]["correlation"]] = _nanoseconds(item["ts"])
    events, ranges = [], []
    for item in items:
        category = item.get("cat")
        if category in ("kernel", "gpu_memcpy", "gpu_memset"):
            events.append(_torch_event(item, category, launches))
        elif category == "user_annotation":
            start = _nanoseconds(item["ts"])
            ranges.append(Range(item["name"], start, start + _nanoseconds(item.get("dur", 0))))
    return _trace("torch.profiler", events, ranges)


def _torch_event(item: dict[str, Any], category: str, launches: dict[int, int]) -> Event:
    start, details = _nanoseconds(item["ts"]), item.get("args", {})
    kind = category.removeprefix("gpu_")
    name = short_name(item["name"]) if kind == "kernel" else kind
    end = start + _nanoseconds(item.get("dur", 0))
    graph = bool(details.get("graph node id"))
    return Event(name, kind, start, end, int(details.get("stream", 0)), launches.get(details.get("correlation")), graph)


def _nanoseconds(microseconds: float) -> int:
    return round(float(microseconds) * 1000)


def _trace(source: str, events: Iterable[Event], ranges: Iterable[Range]) -> Trace:
    return Trace(
        source,
        tuple(sorted(events, key=lambda e: (e.start, e.end))),
        tuple(sorted(ranges, key=lambda r: (r.start, -r.end))),
    )


def window(trace: Trace, name: str) -> Trace:
    """The part of a trace inside the ranges called `name`. ValueError when there is none."""
    windows = [r for r in trace.ranges if r.name == name]
    if not windows:
        raise ValueError(f"the trace has no range named {name!r}: record it with `nanovllm profile`")
    first, last = min(r.start for r in windows), max(r.end for r in windows)
    return Trace(
        trace.source,
        tuple(e for e in trace.events if first <= e.start <= last),
        tuple(r for r in trace.ranges if first <= r.start and r.end <= last),
    )


def labelled(trace: Trace, name: str) -> list[Labelled]:
    """The kernels of the step in the range called `name`, in order, with the ranges each was launched in.

    [] when the trace has no such range or does not know when kernels were launched.
    """
    if not any(r.name == name for r in trace.ranges):
        return []
    part = window(trace, name)
    kernels = [e for e in part.events if e.kind == "kernel" and e.launched is not None]
    stack: list[Range] = []
    found: dict[int, tuple[str, ...]] = {}
    opened = iter(part.ranges)
    following = next(opened, None)
    for index in sorted(range(len(kernels)), key=lambda i: kernels[i].launched or 0):
        when = kernels[index].launched or 0
        while following is not None and following.start <= when:
            stack.append(following)
            following = next(opened, None)
        stack = [r for r in stack if r.end >= when]
        found[index] = tuple(r.name for r in stack if r.name != name)
    return [Labelled(kernel.name, found[index]) for index, kernel in enumerate(kernels)]


def split_steps(trace: Trace) -> list[tuple[Range, list[Event]]]:
    """The events of every STEP range, by when they were launched (by when they ran, where that is not known).

    A step that launched nothing is left out. ValueError when the trace has no STEP range.
    """
    ranges = [r for r in trace.ranges if r.name == STEP]
    if not ranges:
        raise ValueError(f"the trace has no range named {STEP!r}: record it with `nanovllm profile`")
    starts = [r.start for r in ranges]
    steps: list[list[Event]] = [[] for _ in ranges]
    for event in trace.events:
        index = bisect_right(starts, event.start if event.launched is None else event.launched) - 1
        if index >= 0:
            steps[index].append(event)
    return [(r, events) for r, events in zip(ranges, steps, strict=True) if events]
