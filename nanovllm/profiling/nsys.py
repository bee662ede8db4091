"""Nsight Systems as a subprocess: find it, record, import, export.

Nsight Compute ships an `nsys` that records but cannot import its own recording; its importer, `QdstrmImporter`, lies
beside it and is called by hand (NSYS_IMPORTER names one that lies elsewhere). Its shared libraries may be missing on a
bare CUDA image: NSYS_LIBS names a folder that has them (libdw, libelf, libbz2, liblzma, libz).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

NVIDIA = Path("/opt/nvidia")
_RANGE = ("-c", "cudaProfilerApi", "--capture-range-end=stop")


def find_nsys(root: Path = NVIDIA) -> Path | None:
    """nsys from PATH, else the newest one inside Nsight Compute, else None."""
    found = shutil.which("nsys")
    if found:
        return Path(found)
    return max(root.glob("**/target-linux-x64/nsys"), default=None)


def record_command(nsys: Path, prefix: Path, command: Sequence[str], extra: Sequence[str] = _RANGE) -> list[str]:
    """Record `command` between cudaProfilerStart and cudaProfilerStop, every node of a CUDA graph by itself."""
    return [
        str(nsys), "profile", "-t", "cuda,nvtx", "-s", "none", "--cpuctxsw=none", "--cuda-graph-trace=node", *extra,
        "--force-overwrite", "true", "-o", str(prefix), *command,
    ]  # fmt: skip


def importer_of(nsys: Path) -> Path | None:
    """NSYS_IMPORTER, else the QdstrmImporter that belongs to an nsys inside Nsight Compute."""
    if named := os.environ.get("NSYS_IMPORTER"):
        return Path(named)
    roots = [nsys.resolve().parents[1], nsys.resolve().parents[2]] if len(nsys.resolve().parents) > 2 else []
    return next((found for root in roots for found in sorted(root.glob("**/QdstrmImporter"))), None)


def record(
    nsys: Path, prefix: Path, command: Sequence[str], seconds_left: Callable[[], float | None] = lambda: None
) -> Path:
    """Run `command` under nsys; returns the SQLite export. OSError with one sentence when a stage fails.

    `seconds_left()` is what each stage may take; None: any time.
    """
    report, raw, exported = (prefix.with_name(prefix.name + end) for end in (".nsys-rep", ".qdstrm", ".sqlite"))
    for extra in (_RANGE, ()):  # where nsys knows no such range, the whole process is recorded
        run(record_command(nsys, prefix, command, extra), "nsys profile", timeout=seconds_left())
        if report.exists() or raw.exists():
            break
    libs = os.environ.get("NSYS_LIBS", "")
    if not report.exists():
        importer = importer_of(nsys)
        if importer is None or not raw.exists():
            raise OSError(f"nsys left neither {report.name} nor an importer for {raw.name}: install Nsight Systems")
        path = ":".join(part for part in (str(importer.parent), libs) if part)
        importing = [str(importer), "-f", "-i", str(raw), "-o", str(report)]
        run(importing, "QdstrmImporter", {"LD_LIBRARY_PATH": path}, seconds_left())
    path = ":".join(part for part in (libs, os.environ.get("LD_LIBRARY_PATH", "")) if part)
    command = [str(nsys), "export", "-t", "sqlite", "--force-overwrite", "true", "-o", str(exported), str(report)]
    run(command, "nsys export", {"LD_LIBRARY_PATH": path}, seconds_left())
    return exported


def run(
    command: Sequence[str], what: str, environment: Mapping[str, str] | None = None, timeout: float | None = None
) -> str:
    """Run to the end and return stdout. OSError with the last line of what it said when it fails.

    An interrupt, or more than `timeout` seconds, ends the command's whole process group, so that no profiled engine
    stays behind.
    """
    try:
        process = subprocess.Popen(
            list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            errors="replace", env={**os.environ, **(environment or {})},
        )  # fmt: skip
    except OSError as error:
        raise OSError(f"{what} cannot start: {error.strerror or error}") from error
    try:
        said, _ = process.communicate(timeout=timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise OSError(f"{what} took longer than {timeout:.0f} s and was ended") from error
        raise
    if process.returncode:
        raise OSError(f"{what} failed with status {process.returncode}: {complaint(said)}")
    return said


def complaint(said: str) -> str:
    """The line of a failed command's output that says most: a full disk, the engine's own sentence, or the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if any("No space left" in line for line in lines):
        return "the disk is full; free some space, or let TMPDIR name a larger disk"
    if any("ERR_NVGPUCTRPERM" in line for line in lines):
        return "this user may not read the GPU's performance counters (NVIDIA's ERR_NVGPUCTRPERM); ask an administrator"
    own = [line for line in lines if line.startswith("nanovllm: ")]
    return own[-1].removeprefix("nanovllm: ") if own else (lines[-1] if lines else "it said nothing")
