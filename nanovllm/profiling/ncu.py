"""Nsight Compute as a subprocess: hardware counters of every kernel of one step, as typed rows.

Each kernel is replayed by itself behind flushed caches, at the clocks that the device happens to have: no overlap, no
activations in L2. Counters tell what a kernel does to the memory; how long it takes in a step is nsys's to say.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanovllm.profiling.attribute import attribute
from nanovllm.profiling.nsys import NVIDIA, complaint
from nanovllm.profiling.trace import LABELS, Labelled, short_name

_METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
}
_SCALE = {"": 1.0, "%": 1.0, "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1e-3, "nsecond": 1e-3,
          "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}  # fmt: skip


def find_ncu(root: Path = NVIDIA) -> Path | None:
    """ncu from PATH, else the newest one of Nsight Compute, else None."""
    found = shutil.which("ncu")
    return Path(found) if found else max(root.glob("nsight-compute/*/ncu"), default=None)


def ncu_command(ncu: Path, command: Sequence[str]) -> list[str]:
    """Count every kernel between cudaProfilerStart and -Stop; CSV on stdout, with the NVTX ranges of each."""
    return [
        str(ncu), "--csv", "--page", "raw", "--profile-from-start", "off", "--clock-control", "none", "--nvtx",
        "--target-processes", "all", "--metrics", ",".join(_METRICS), *command,
    ]  # fmt: skip


def split(said: str, cases: Sequence[str]) -> dict[str, str]:
    """ncu's table as one CSV a case, by the labelled step that a kernel ran in. ValueError when there is no table."""
    lines = said.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError(f"ncu printed no table: {complaint(said)}")
    header, rows = lines[start : start + 2], [line for line in lines[start + 2 :] if line.startswith('"')]
    named = {case: re.compile(rf"{re.escape(f'{LABELS} {case}')}(?![\w-])") for case in cases}
    found = {case: [row for row in rows if name.search(row)] for case, name in named.items()}
    if rows and not any(found.values()):
        raise ValueError("ncu's table names no NVTX ranges, so its kernels cannot be told apart by case")
    return {case: "\n".join([*header, *own]) + "\n" for case, own in found.items() if own}


@dataclass(frozen=True, slots=True)
class Counted:
    """What the counters say about a kernel in a role, means over its launches in one step. Bytes are DRAM traffic."""

    name: str
    role: str
    launches: int
    us: float
    bytes_read: float
    bytes_written: float
    dram_percent: float  # of the peak throughput, while it ran
    occupancy_percent: float  # warps resident while an SM was active

    @property
    def gb_s(self) -> float:
        """Achieved DRAM bandwidth."""
        return (self.bytes_read + self.bytes_written) / self.us / 1e3 if self.us else 0.0


def count(table: str, num_layers: int, labelled: Sequence[Labelled]) -> list[Counted]:
    """Rows of one case (`split`) by kernel and role, those with most time first. ValueError when it is no table."""
    reader = csv.DictReader(io.StringIO(table))
    units = next(reader, {})  # the row below the header
    try:
        rows = [
            {short: float(row[metric].replace(",", "")) * _SCALE[units[metric]] for metric, short in _METRICS.items()}
            | {"name": row["Kernel Name"]}
            for row in reader
        ]
    except (KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"not a table of ncu: {error}") from error
    names = [short_name(str(row["name"])) for row in rows]
    groups: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for name, place, row in zip(names, attribute(names, num_layers, labelled), rows, strict=True):
        groups[name, place.role].append({key: float(value) for key, value in row.items() if key != "name"})
    found = []
    for (name, role), group in groups.items():
        n = len(group)
        mean = {key: sum(row[key] for row in group) / n for key in _METRICS.values()}
        found.append(
            Counted(
                name, role, n, mean["us"], mean["read"], mean["written"], mean["dram"], mean["occupancy"]
            )
        )  # fmt: skip
    return sorted(found, key=lambda c: -c.us * c.launches)
