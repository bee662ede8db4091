"""Record cases, fused and unfused: the engine runs in processes of its own, without and with a recorder.

For each kind of fusion one process times the steps of all cases that nothing records, a second one runs them under
Nsight Systems (PyTorch's profiler where there is none, which the report says), and `count` adds a third under Nsight
Compute. What is left of each case is one small file (`recording`), of which `publish` makes the reports. The profilers'
own files live in a temporary folder and go with it, unless `keep_raw` names another. A case that fails becomes a
sentence, and the others go on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovllm.profiling import ncu, nsys, recording, report
from nanovllm.profiling.distil import Profile, distil
from nanovllm.profiling.facts import CASES, Facts
from nanovllm.profiling.recording import Recording
from nanovllm.profiling.trace import Trace, read_trace

FUSIONS = {"both": ("off", "auto"), "off": ("off",), "on": ("on",), "auto": ("auto",)}
NO_NSYS = "nsys was not found, so PyTorch's profiler recorded this: host gaps include its own cost"
NO_NCU = "ncu was not found: install Nsight Compute for measured DRAM traffic and occupancy"
LEAST_SECONDS = 15.0  # an engine that has less is not started
Say = Callable[[str], Any]


@dataclass(frozen=True)
class Request:
    """What to profile. `options` are keywords of `LLM`; `name` is what reports call the model."""

    model: str
    cases: tuple[str, ...]
    fusions: tuple[str, ...] = ("off", "auto")
    profiler: str = "auto"  # auto, nsys or torch
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    keep_raw: Path | None = None
    device: str = "cuda"
    origin: dict[str, str] = field(default_factory=dict)  # date and commit, where known
    ncu_seconds: float = 120.0  # ncu is ended after so long
    deadline: float = math.inf  # of `time.monotonic`: what still runs then is ended

    def __post_init__(self) -> None:
        for case in self.cases:
            if case not in CASES:
                raise ValueError(f"unknown case {case!r}: use one of {', '.join(CASES)}")
        if self.profiler not in ("auto", "nsys", "torch"):
            raise ValueError(f"profiler must be auto, nsys or torch, got {self.profiler!r}")

    @property
    def ordered(self) -> list[str]:
        """The cases in the order they run."""
        return [case for case in CASES if case in self.cases]

    def seconds_left(self, most: float = math.inf) -> float | None:
        """What a process may take, up to `most`; None without a limit. OSError when too little is left for one."""
        left = min(most, self.deadline - time.monotonic())
        if left < LEAST_SECONDS:
            raise OSError("the time limit is over")
        return left if math.isfinite(left) else None


def require_gpu() -> None:
    """OSError with one sentence where there is nothing to profile."""
    import torch

    if not torch.cuda.is_available():
        raise OSError("profiling needs a CUDA GPU and PyTorch finds none: run it on a machine that has one")


def choose_profiler(wanted: str, found: Path | None) -> str:
    """ "nsys" or "torch". OSError when nsys was asked for and is not there."""
    if wanted == "nsys" and found is None:
        raise OSError("nsys was not found on PATH nor in Nsight Compute: install Nsight Systems, or use torch")
    return "torch" if wanted == "torch" or found is None else "nsys"


def record(request: Request, folder: Path, say: Say = print) -> list[str]:
    """Record every case with every fusion; one file each goes to `folder`. Returns what is missing, a sentence each.

    OSError or ValueError, one sentence, when an engine does not start or nothing records it.
    """
    found = nsys.find_nsys()
    profiler = choose_profiler(request.profiler, found)
    note = NO_NSYS if profiler == "torch" and request.profiler == "auto" else ""
    if note:
        say(note)
    missing: list[str] = []
    with _scratch(request) as scratch:
        for fusion in request.fusions:
            say(f"fusion {fusion}: timing without a recorder")
            free = _child(request, scratch, fusion, "none")
            nsys.run(free.command, "the timed engine", timeout=request.seconds_left())
            say(f"fusion {fusion}: recording {', '.join(request.ordered)} with {profiler}")
            try:
                trace, left = _trace(request, scratch, fusion, profiler, found, note)
            except (OSError, ValueError) as error:
                if profiler != "nsys" or request.profiler != "auto":
                    raise
                note = f"nsys could not record ({error}), so PyTorch's profiler did: host gaps include its own cost"
                profiler = "torch"
                say(note)
                trace, left = _trace(request, scratch, fusion, profiler, found, note)
            for case in request.ordered:
                missing += [f"{case} fusion {fusion}: {why}" for why in _save(case, free, left, trace, folder)]
    for sentence in missing:
        say(sentence)
    return missing


def _save(case: str, free: Child, left: Child, trace: Trace, folder: Path) -> list[str]:
    """Write one recording, without times if they were not measured; what is missing."""
    missing, times = [], {}
    try:
        times = free.told(case)
    except (OSError, ValueError) as error:
        missing.append(f"not timed without a recorder ({error})")
    try:
        facts = Facts.from_json(json.dumps(left.told(case)))
        facts = dataclasses.replace(facts, **{f"free_{name}": value for name, value in times.items()})
        recording.save(Recording(facts, recording.cut(trace, case)), folder)
    except (OSError, ValueError) as error:
        missing.append(f"not recorded ({error})")
        if (export := Path(f"{left.prefix}.sqlite")).exists():
            shutil.copy(export, folder)  # to see what it holds instead
    return missing


def count(request: Request, folder: Path, say: Say = print) -> list[str]:
    """Add ncu's counters of one step to the recordings in `folder`, or the sentence that says why there are none.

    Returns these sentences.
    """
    found, missing = ncu.find_ncu(), []
    for fusion in request.fusions:
        cases = [case for case in request.ordered if CASES[case].prompt]  # a workload takes too long to get going
        tables, why = {}, NO_NCU
        if found is not None and cases:
            say(f"fusion {fusion}: counting one step of {', '.join(cases)} with ncu")
            with _scratch(request) as scratch:
                child = _child(dataclasses.replace(request, cases=tuple(cases)), scratch, fusion, "ncu")
                said = ""
                try:
                    seconds = request.seconds_left(request.ncu_seconds)
                    said = nsys.run(ncu.ncu_command(found, child.command), "ncu", timeout=seconds)
                    tables = ncu.split(said, cases)
                    why = "ncu counted none of its kernels"
                except (OSError, ValueError) as error:
                    why = str(error)
                    (folder / f"ncu.{fusion}.txt").write_text(said, encoding="utf-8")  # to see what it was instead
        if uncounted := [case for case in cases if case not in tables]:
            missing.append(f"fusion {fusion}: no counters of {', '.join(uncounted)}: {why}")
            say(missing[-1])
        for case in cases:
            path = folder / f"{case}.{fusion}{recording.SUFFIX}"
            if path.exists():
                left = recording.load(path)
                recording.save(dataclasses.replace(left, counters=tables.get(case, why)), folder)
    return missing


def publish(
    recordings: Path, out: Path, command: Callable[[Sequence[Profile]], Sequence[str]]
) -> dict[str, list[Profile]]:
    """Distil every recording in a folder and write `out`/CASE; `command(profiles)` is what to run for them again."""
    published = {}
    for case, found in recording.load_all(recordings).items():
        published[case] = [distil(one) for one in found]
        write(out / case, published[case], command(published[case]))
    return published


def write(folder: Path, profiles: Sequence[Profile], command: Sequence[str]) -> list[Path]:
    """Write command.txt, summary.csv, timeline.html and notes.md into `folder`; returns their paths."""
    from nanovllm.profiling import timeline
    from nanovllm.profiling.files import write_whole

    files = {
        "command.txt": shlex.join(command) + "\n",
        "summary.csv": report.summary_csv(profiles),
        "timeline.html": timeline.render(profiles),
        "notes.md": report.notes(profiles),
    }
    for name, text in files.items():
        write_whole(folder / name, text)
    return [folder / name for name in files]


@dataclass(frozen=True)
class Child:
    """A process to be run, and where it leaves its results."""

    command: list[str]
    prefix: Path

    def result(self, case: str) -> Path:
        """JSON: the facts of a case, or its times."""
        return self.prefix.with_name(f"{self.prefix.name}.{case}.json")

    def told(self, case: str) -> dict[str, Any]:
        """What it left of a case. ValueError with its sentence when the case failed."""
        found: dict[str, Any] = json.loads(self.result(case).read_text(encoding="utf-8"))
        if "error" in found:
            raise ValueError(found["error"])
        return found


@contextmanager
def _scratch(request: Request) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nanovllm-profile-") as temporary:
        folder = request.keep_raw or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def _child(request: Request, folder: Path, fusion: str, profiler: str, note: str = "") -> Child:
    prefix = folder / f"{fusion}-{profiler}"
    spec = {
        "model": request.model, "name": request.name or request.model, "cases": request.ordered, "fusion": fusion,
        "profiler": profiler, "device": request.device, "options": request.options, "out": str(prefix), "note": note,
        "origin": request.origin,
    }  # fmt: skip
    path = folder / f"{prefix.name}.spec.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return Child([sys.executable, "-m", "nanovllm.profiling.child", str(path)], prefix)


def _trace(
    request: Request, folder: Path, fusion: str, profiler: str, found: Path | None, note: str
) -> tuple[Trace, Child]:
    child = _child(request, folder, fusion, profiler, note)
    if profiler == "nsys" and found is not None:
        return read_trace(nsys.record(found, child.prefix, child.command, request.seconds_left)), child
    nsys.run(child.command, "the profiled engine", timeout=request.seconds_left())
    return read_trace(Path(f"{child.prefix}.trace.json")), child
