"""What one run of a case left behind, small enough to keep and to carry: facts, events, counters; `distil` reads it.

A file is gzipped JSON. It holds the events of the case's windows only, names once: some 100 KB where the profiler's
own report has megabytes.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanovllm.profiling.facts import Facts
from nanovllm.profiling.files import write_whole
from nanovllm.profiling.trace import LABELS, WINDOW, Event, Range, Trace, window

SUFFIX = ".profile.json.gz"
_KINDS = ("kernel", "memcpy", "memset")


@dataclass(frozen=True, slots=True)
class Recording:
    """One case with one kind of fusion. `counters`: ncu's table for the labelled step, or a sentence why not."""

    facts: Facts
    trace: Trace
    counters: str = ""

    @property
    def file_name(self) -> str:
        """One name a case and fusion."""
        return f"{self.facts.case}.{self.facts.fusion}{SUFFIX}"


def cut(trace: Trace, case: str) -> Trace:
    """What a trace of several cases says about one."""
    names = [name for name in (f"{WINDOW} {case}", f"{LABELS} {case}") if any(r.name == name for r in trace.ranges)]
    parts = [window(trace, name) for name in names or [f"{WINDOW} {case}"]]
    return Trace(trace.source, sum((p.events for p in parts), ()), sum((p.ranges for p in parts), ()))


def save(recording: Recording, folder: Path) -> Path:
    """Write a recording into `folder`; OSError with one sentence when that fails."""
    trace = recording.trace
    names = {name: i for i, name in enumerate(dict.fromkeys([e.name for e in trace.events]))}
    data = {
        "facts": asdict(recording.facts),
        "source": trace.source,
        "names": list(names),
        "events": [
            [names[e.name], _KINDS.index(e.kind), e.start, e.end - e.start, e.stream, e.launched, int(e.in_graph)]
            for e in trace.events
        ],
        "ranges": [[r.name, r.start, r.end - r.start] for r in trace.ranges],
        "counters": recording.counters,
    }
    path = folder / recording.file_name
    text = json.dumps(data, separators=(",", ":"))
    write_whole(path, gzip.compress(text.encode(), compresslevel=9, mtime=0))
    return path


def load(path: Path) -> Recording:
    """Inverse of `save`. ValueError for any other file."""
    try:
        data: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
        names = data["names"]
        events = tuple(
            Event(names[name], _KINDS[kind], start, start + length, stream, launched, bool(in_graph))
            for name, kind, start, length, stream, launched, in_graph in data["events"]
        )
        ranges = tuple(Range(name, start, start + length) for name, start, length in data["ranges"])
        facts = Facts.from_json(json.dumps(data["facts"]))
        return Recording(facts, Trace(data["source"], events, ranges), data["counters"])
    except (ValueError, KeyError, TypeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no recorded profile: {error}") from error


def load_all(folder: Path) -> dict[str, list[Recording]]:
    """The recordings in a folder by case, unfused ones first."""
    found: dict[str, list[Recording]] = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        recording = load(path)
        found.setdefault(recording.facts.case, []).append(recording)
    for recordings in found.values():
        recordings.sort(key=lambda r: ("off", "auto", "on").index(r.facts.fusion))
    return found
