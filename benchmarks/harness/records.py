"""One measured number a row, with everything needed to know what it is a measurement of.

`metrics.csv` is keyed: measuring the same thing again replaces the row. The file is written whole and renamed into
place, so that an interrupted run never leaves half a file.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

METRICS = Path(__file__).resolve().parents[1] / "bench_results" / "metrics.csv"


@dataclass(frozen=True)
class Record:
    """One measurement. `test` names the procedure, `metric` the quantity with its unit as a suffix."""

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

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows measurements of the same thing."""
        return (
            self.engine, self.version, self.model, self.device, self.dtype, self.weights,
            self.test, self.metric, self.batch, self.prompt, self.out, self.options,
        )  # fmt: skip


def provenance(device: str) -> dict[str, str]:
    """Fields that every row of one run shares. `device` is "cpu" or "cuda"."""
    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "torch": torch.__version__,
        "triton": triton_version,
    }


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
    """Short hash of the checkout, "+" appended when it has changes; NANOVLLM_COMMIT where there is no git."""
    if "NANOVLLM_COMMIT" in os.environ:
        return os.environ["NANOVLLM_COMMIT"]
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def read(path: Path = METRICS) -> list[Record]:
    """All rows of a CSV; [] when there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [replace(Record(**row), value=float(row["value"])) for row in csv.DictReader(file)]


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
                writer.writerow({**asdict(record), "value": f"{record.value:.6g}"})
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"cannot write {path} ({why}): free some space; the old file is unchanged") from error
    finally:
        partial.unlink(missing_ok=True)
