"""Record a case, fused and unfused, and distil it: the engine runs in a process of its own under the profiler.

Nsight Systems when there is one, else PyTorch's profiler, which says so in the report. Raw recordings live in a
temporary folder and go with it, unless `keep_raw` names another; results are written at the end, whole or not at all.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovllm.profiling import nsys, report
from nanovllm.profiling.distil import Profile, distil
from nanovllm.profiling.facts import CASES, Facts
from nanovllm.profiling.trace import read_trace

FUSIONS = {"both": ("off", "auto"), "off": ("off",), "on": ("on",), "auto": ("auto",)}
NO_NSYS = "nsys was not found, so PyTorch's profiler recorded this: host gaps include its own cost"


@dataclass(frozen=True)
class Request:
    """What to profile. `options` are keywords of `LLM`; `name` is what reports call the model."""

    model: str
    case: str
    fusions: tuple[str, ...] = ("off", "auto")
    profiler: str = "auto"  # auto, nsys or torch
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    ncu: bool = False
    keep_raw: Path | None = None

    def __post_init__(self) -> None:
        if self.case not in CASES:
            raise ValueError(f"unknown case {self.case!r}: use one of {', '.join(CASES)}")
        if self.profiler not in ("auto", "nsys", "torch"):
            raise ValueError(f"profiler must be auto, nsys or torch, got {self.profiler!r}")


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


def profile(request: Request, say: Callable[[str], Any] = print) -> tuple[list[Profile], str]:
    """Record every fusion of a request; the profiles and ncu's table (or why there is none). Writes nothing."""
    require_gpu()
    found = nsys.find_nsys()
    profiler = choose_profiler(request.profiler, found)
    note = NO_NSYS if profiler == "torch" and request.profiler == "auto" else ""
    if note:
        say(note)
    profiles, counters = [], []
    with tempfile.TemporaryDirectory(prefix="nanovllm-profile-") as temporary:
        folder = request.keep_raw or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for fusion in request.fusions:
            say(f"{request.case}, fusion {fusion}: recording with {profiler}")
            spec = specification(request, fusion, profiler, folder, note)
            profiles.append(_record(spec, found if profiler == "nsys" else None, folder))
            if request.ncu:
                counters.append(f"fusion {fusion}:\n{_count(spec, folder)}")
    return profiles, "\n\n".join(counters)


def specification(request: Request, fusion: str, profiler: str, folder: Path, note: str) -> dict[str, Any]:
    """What `child` reads."""
    stem = folder / f"{request.case}-{fusion}"
    return {
        "model": request.model,
        "name": request.name or request.model,
        "case": request.case,
        "fusion": fusion,
        "profiler": profiler,
        "options": request.options,
        "facts": f"{stem}.facts.json",
        "trace": f"{stem}.trace.json",
        "note": note,
    }


def _child(spec: dict[str, Any], folder: Path, name: str) -> list[str]:
    path = folder / f"{name}.spec.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return [sys.executable, "-m", "nanovllm.profiling.child", str(path)]


def _record(spec: dict[str, Any], found: Path | None, folder: Path) -> Profile:
    name = f"{spec['case']}-{spec['fusion']}"
    command = _child(spec, folder, name)
    if found is not None:
        trace = nsys.record(found, folder / name, command)
    else:
        nsys.run(command, "the profiled engine")
        trace = Path(spec["trace"])
    facts = Facts.from_json(Path(spec["facts"]).read_text(encoding="utf-8"))
    return distil(read_trace(trace), facts, isolated=CASES[spec["case"]].isolated)


def _count(spec: dict[str, Any], folder: Path) -> str:
    """ncu's table for the first kernels of the window; a sentence when it cannot count."""
    ncu = nsys.find_ncu()
    if ncu is None:
        return "ncu was not found: install Nsight Compute for measured DRAM traffic."
    facts = str(folder / "ncu.facts.json")  # timings under ncu mean nothing
    command = _child({**spec, "profiler": "ncu", "facts": facts}, folder, "ncu")
    try:
        measured = nsys.parse_ncu(nsys.run(nsys.ncu_command(ncu, command, launches=400), "ncu"))
    except (OSError, ValueError) as error:
        return f"No counters: {error}."
    return report.ncu_table(measured)


def write(folder: Path, profiles: Sequence[Profile], counters: str, command: Sequence[str]) -> list[Path]:
    """Write command.txt, summary.csv, timeline.html and notes.md into `folder`; returns their paths."""
    from nanovllm.profiling import timeline
    from nanovllm.profiling.files import write_whole

    files = {
        "command.txt": shlex.join(command) + "\n",
        "summary.csv": report.summary_csv(profiles),
        "timeline.html": timeline.render(profiles),
        "notes.md": report.notes(profiles, counters),
    }
    for name, text in files.items():
        write_whole(folder / name, text)
    return [folder / name for name in files]
