"""One measured number a row, with everything needed to know what it is a measurement of.

`metrics.csv` is keyed: measuring the same thing again replaces the row. The file is written whole and renamed into
place, so that an interrupted run never leaves half a file. Columns may be added at the end: what an older file lacks
is empty.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

METRICS = Path(__file__).resolve().parents[1] / "bench_results" / "metrics.csv"


@dataclass(frozen=True)
class Record:
    """One measurement. `test` names the procedure, `metric` the quantity with its unit as a suffix.

    `value` is the median of `runs` runs and p20 and p80 are their percentiles, where a row has them. `bytes` and
    `flop`: what the measured unit (a decode step, a prompt) must at least read and compute, from the shapes.
    """

    test: str
    metric: str
    value: float
    engine: str = "nanovllm"
    version: str = ""
    model: str = ""
    device: str = ""
    dtype: str = ""
    weights: str = ""
    batch: str = ""
    prompt: str = ""
    out: str = ""
    options: str = ""
    date: str = ""
    commit: str = ""
    torch: str = ""
    triton: str = ""
    note: str = ""
    p20: float | None = None
    p80: float | None = None
    runs: int | None = None
    bytes: float | None = None
    flop: float | None = None
    driver: str = ""
    run: str = ""  # names the run of a suite: rows that share it were measured in turns, on one machine

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows measurements of the same thing."""
        return (
            self.engine, self.version, self.model, self.device, self.dtype, self.weights,
            self.test, self.metric, self.batch, self.prompt, self.out, self.options,
        )  # fmt: skip


NUMBERS = ("value", "p20", "p80", "runs", "bytes", "flop")  # the columns that are no text


def provenance(device: str) -> dict[str, str]:
    """Fields that every row of one run shares. `device` is "cpu" or "cuda"."""
    import torch

    if device == "cuda":
        torch.cuda.init()
    return {**installed(device), "date": datetime.date.today().isoformat(), "commit": git_commit()}


def installed(device: str) -> dict[str, str]:
    """The part of the provenance that belongs to this interpreter: torch, Triton and device.

    The device is "" where this process has not used CUDA itself: to ask would take its memory.
    """
    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    if device == "cpu":
        name = f"{cpu_name()}, {torch.get_num_threads()} threads"
    else:
        name = torch.cuda.get_device_name() if torch.cuda.is_initialized() else ""
    return {"device": name, "torch": torch.__version__, "triton": triton_version}


def cpu_name() -> str:
    """The processor's marketing name, or its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def git_commit() -> str:
    """Short hash of the checkout, "+" appended when it has changes; NANOVLLM_COMMIT where there is no git.

    Changed results are no change: a run writes them itself.
    """
    if "NANOVLLM_COMMIT" in os.environ:
        return os.environ["NANOVLLM_COMMIT"]
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = [*git, "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/bench_results"]
        dirty = subprocess.run(changes, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def read(path: Path = METRICS) -> list[Record]:
    """All rows of a CSV; [] when there is none. ValueError, one sentence, for a file that is no such CSV."""
    if not path.exists():
        return []
    names = {f.name for f in fields(Record)}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        unknown = [name for name in reader.fieldnames or [] if name not in names]
        if unknown:
            raise ValueError(
                f"{path} has columns that no row has ({', '.join(unknown)}): is it a file of this project?"
            )
        try:
            return [_parsed(row) for row in reader]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: not a row ({error}); measure it again") from error


def _parsed(row: dict[str, Any]) -> Record:
    if None in row or None in row.values():
        raise ValueError("too many or too few columns")
    numbers: dict[str, Any] = {n: float(row[n]) if row[n] else None for n in NUMBERS if n in row}
    if numbers.get("runs") is not None:
        numbers["runs"] = int(numbers["runs"])
    if numbers.get("value") is None:
        raise ValueError("it has no value")
    return Record(**{**row, **numbers})


def write(records: list[Record], path: Path = METRICS) -> None:
    """Merge `records` into the CSV at `path`: rows with the same key are replaced, the rest is kept.

    OSError with one sentence when it cannot be written (say, the disk is full); the old file is then unchanged.
    """
    merged = {record.key: record for record in [*read(path), *records]}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Record)], lineterminator="\n")
            writer.writeheader()
            for record in sorted(merged.values(), key=lambda r: r.key):
                writer.writerow(_texts(record))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"cannot write {path} ({why}): free some space; the old file is unchanged") from error
    finally:
        partial.unlink(missing_ok=True)


def _texts(record: Record) -> dict[str, str]:
    """A row as text: numbers with six digits, empty where there is none."""
    found = asdict(record)
    return {**found, **{n: "" if found[n] is None else f"{found[n]:.6g}" for n in NUMBERS}}
