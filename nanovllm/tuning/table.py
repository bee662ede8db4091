"""The table of one device: merged with what is there, written whole and renamed into place.

    {"device": ..., "runs": [{"date": ..., "nanovllm": ..., "torch": ..., ...}], "rows": [{"m": ..., "run": 0}, ...]}

`runs` says under which software a row was measured: measuring some problems again replaces their rows and leaves the
others with the run that they come from.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanovllm import __version__
from nanovllm.kernels.fusion_table import load_table, table_name
from nanovllm.tuning.measure import Result

Row = dict[str, Any]


def provenance(rotated_bytes: int) -> dict[str, str]:
    """What was measured with: versions, driver, date, method. Nothing that identifies the machine."""
    import importlib.metadata

    import torch

    return {
        "date": datetime.date.today().isoformat(),
        "nanovllm": __version__,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "driver": _driver(),
        "method": f"us a call in a CUDA graph, weights rotated through {rotated_bytes / 1e6:.0f} MB, median of turns",
    }


def _driver() -> str:
    """Version of the NVIDIA driver, or "unknown"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.split() or ["unknown"])[0]


def rows_of(results: Iterable[Result]) -> list[Row]:
    """A row for each problem."""
    rows = {}
    for result in results:
        p = result.case.problem
        rows[p] = dict(
            m=p.m, n=p.n, k=p.k, dtype=p.dtype, swiglu=p.swiglu, config=result.choice(),
            fused_us=round(result.us(result.best()), 3), unfused_us=round(result.us("unfused"), 3),
        )  # fmt: skip
        if result.has_dependents:
            best = result.best(dependent=True)
            rows[p] |= dict(dependent=result.choice(dependent=True), dependent_us=round(result.us(best), 3))
    return list(rows.values())


def merge(old: dict[str, Any] | None, device: str, rows: Iterable[Row], run: dict[str, str]) -> dict[str, Any]:
    """The table with `rows` of `run` in it; they replace rows of the same problem, and runs without rows go."""
    runs = [*(old["runs"] if old else []), run]
    merged = {_problem(row): row for row in (old["rows"] if old else [])}
    merged |= {_problem(row): {**row, "run": len(runs) - 1} for row in rows}
    used = sorted({row["run"] for row in merged.values()})
    return {
        "device": device,
        "runs": [runs[i] for i in used],
        "rows": [{**merged[key], "run": used.index(merged[key]["run"])} for key in sorted(merged)],
    }


def _problem(row: Row) -> tuple[Any, ...]:
    return row["dtype"], row["swiglu"], row["k"], row["n"], row["m"]


def read_table(path: Path) -> dict[str, Any] | None:
    """A table to merge into; None where there is none. ValueError for a file that is no table."""
    if not path.exists():
        return None
    load_table.cache_clear()  # the file may be another one by now
    load_table(path)
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "runs" not in table or any("run" not in row for row in table["rows"]):
        raise ValueError(f"{path} does not say in which run its rows were measured: delete it, or give another folder")
    return table


def write_table(path: Path, table: dict[str, Any]) -> None:
    """Replace `path` in one step; one row a line, so that differences read well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = ",\n".join(f' "{name}": {json.dumps(table[name])}' for name in ("device", "runs"))
    rows = ",\n".join(f"  {json.dumps(row)}" for row in table["rows"])
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(f'{{\n{head},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")
    os.replace(partial, path)


class TableWriter:
    """Keeps the table of `device` in `folder` up to date while results come in."""

    def __init__(self, folder: Path, device: str, run: dict[str, str]) -> None:
        self.path = folder / table_name(device)
        self.device = device
        self.run = run
        self._before = read_table(self.path)
        self._results: list[Result] = []

    def add(self, result: Result) -> None:
        """Write the table with `result` in it: an interrupted run keeps what it measured."""
        self._results.append(result)
        write_table(self.path, merge(self._before, self.device, rows_of(self._results), self.run))
