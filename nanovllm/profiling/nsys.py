"""Nsight Systems and Nsight Compute as subprocesses: find them, record, import, export.

Nsight Compute ships an `nsys` that records but cannot import its own recording; its importer, `QdstrmImporter`, lies
beside it and is called by hand. Its shared libraries may be missing on a bare CUDA image: NSYS_LIBS names a folder
that has them (libdw, libelf, libbz2, liblzma, libz).
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import signal
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_NVIDIA = Path("/opt/nvidia")
_RANGE = ("-c", "cudaProfilerApi", "--capture-range-end=stop")
_NCU_METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
}
_SCALE = {"": 1.0, "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1e-3, "nsecond": 1e-3, "us": 1.0,
          "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}  # fmt: skip


def find_nsys(root: Path = _NVIDIA) -> Path | None:
    """nsys from PATH, else the newest one inside Nsight Compute, else None."""
    found = shutil.which("nsys")
    if found:
        return Path(found)
    return max(root.glob("**/target-linux-x64/nsys"), default=None)


def find_ncu(root: Path = _NVIDIA) -> Path | None:
    """ncu from PATH, else the newest one of Nsight Compute, else None."""
    found = shutil.which("ncu")
    return Path(found) if found else max(root.glob("nsight-compute/*/ncu"), default=None)


def record_command(nsys: Path, prefix: Path, command: Sequence[str], extra: Sequence[str] = _RANGE) -> list[str]:
    """Record `command` between cudaProfilerStart and cudaProfilerStop, every node of a CUDA graph by itself."""
    return [
        str(nsys), "profile", "-t", "cuda,nvtx", "-s", "none", "--cpuctxsw=none", "--cuda-graph-trace=node", *extra,
        "--force-overwrite", "true", "-o", str(prefix), *command,
    ]  # fmt: skip


def importer_of(nsys: Path) -> Path | None:
    """The QdstrmImporter that belongs to an nsys inside Nsight Compute."""
    roots = [nsys.resolve().parents[1], nsys.resolve().parents[2]] if len(nsys.resolve().parents) > 2 else []
    return next((found for root in roots for found in sorted(root.glob("**/QdstrmImporter"))), None)


def record(nsys: Path, prefix: Path, command: Sequence[str]) -> Path:
    """Run `command` under nsys; returns the SQLite export. OSError with one sentence when a stage fails."""
    report, raw, exported = (prefix.with_name(prefix.name + end) for end in (".nsys-rep", ".qdstrm", ".sqlite"))
    for extra in (_RANGE, ()):  # an nsys that ignores the range records the whole process instead
        run(record_command(nsys, prefix, command, extra), "nsys profile")
        if report.exists() or raw.exists():
            break
    libs = os.environ.get("NSYS_LIBS", "")
    if not report.exists():
        importer = importer_of(nsys)
        if importer is None or not raw.exists():
            raise OSError(f"nsys left neither {report.name} nor an importer for {raw.name}: install Nsight Systems")
        path = ":".join(part for part in (str(importer.parent), libs) if part)
        run([str(importer), "-f", "-i", str(raw), "-o", str(report)], "QdstrmImporter", {"LD_LIBRARY_PATH": path})
    path = ":".join(part for part in (libs, os.environ.get("LD_LIBRARY_PATH", "")) if part)
    command = [str(nsys), "export", "-t", "sqlite", "--force-overwrite", "true", "-o", str(exported), str(report)]
    run(command, "nsys export", {"LD_LIBRARY_PATH": path})
    return exported


def run(command: Sequence[str], what: str, environment: Mapping[str, str] | None = None) -> str:
    """Run to the end and return stdout. OSError with the last line of what it said when it fails.

    An interrupt ends the command's whole process group, so that no profiled engine stays behind.
    """
    try:
        process = subprocess.Popen(
            list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            errors="replace", env={**os.environ, **(environment or {})},
        )  # fmt: skip
    except OSError as error:
        raise OSError(f"{what} cannot start: {error.strerror or error}") from error
    try:
        said, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
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


@dataclass(frozen=True, slots=True)
class Measured:
    """What ncu's counters say about one kernel, means over its launches. Bytes are DRAM traffic."""

    kernel: str
    launches: int
    us: float
    bytes_read: float
    bytes_written: float

    @property
    def gb_s(self) -> float:
        """Achieved DRAM bandwidth."""
        return (self.bytes_read + self.bytes_written) / self.us / 1e3 if self.us else 0.0


def ncu_command(ncu: Path, command: Sequence[str], launches: int) -> list[str]:
    """Count the DRAM traffic of the first `launches` kernels after cudaProfilerStart; CSV on stdout."""
    return [
        str(ncu), "--csv", "--page", "raw", "--profile-from-start", "off", "--graph-profiling", "node",
        "--target-processes", "all", "--launch-count", str(launches), "--metrics", ",".join(_NCU_METRICS), *command,
    ]  # fmt: skip


def parse_ncu(said: str) -> list[Measured]:
    """Rows of `ncu --csv --page raw`, the kernels with most time first. ValueError when there is no table."""
    lines = said.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError(f"ncu printed no table: {complaint(said)}")
    reader = csv.DictReader(io.StringIO("\n".join(line for line in lines[start:] if line.startswith('"'))))
    units = next(reader, {})  # the row below the header
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in reader:
        kernel = totals[row["Kernel Name"].split("(")[0].split("<")[0].rsplit("::", 1)[-1].removeprefix("void ")]
        kernel["launches"] += 1
        for metric, short in _NCU_METRICS.items():
            kernel[short] += float(row[metric].replace(",", "")) * _SCALE[units[metric]]
    found = []
    for name, total in totals.items():
        n = total["launches"]
        found.append(Measured(name, int(n), total["us"] / n, total["read"] / n, total["written"] / n))
    return sorted(found, key=lambda m: -m.us * m.launches)
