"""Measured configurations of `rms_norm_linear`, and the choice between them and the heuristic. No torch, no triton.

`choose` asks the measured tables of the device first and `fusion_config.heuristic` otherwise. A table is
`rms_norm_linear/<device>.json` in the user's folder (`user_tables`) or in this package's `tuned/`; of a problem in both
the user's row counts. Each row names one measured problem, the fastest configuration found and both times, and where
the GPU knows dependent launches, the fastest of those as well. Where the fused kernels lost, it says "unfused", so that
on a tuned device the operator is never slower than its parts.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.kernels.fusion_config import MAX_PAIR_ROWS, FusionConfig, Problem, heuristic
from nanovllm.kernels.launch_config import Gpu

OPERATOR = "rms_norm_linear"  # the folder of its tables
TABLES = Path(__file__).resolve().parent / "tuned" / OPERATOR
VARIABLE = "NANOVLLM_TUNED"


@dataclass(frozen=True, slots=True)
class TunedRow:
    """One measurement: the fastest configuration of a problem, its time and that of norm + linear (µs).

    `dependent`: the fastest where dependent launches are allowed; None where none was measured.
    """

    problem: Problem
    config: FusionConfig
    fused_us: float
    unfused_us: float
    dependent: FusionConfig | None = None


def table_name(device: str) -> str:
    """File name of a device: "NVIDIA H100 80GB HBM3" -> nvidia_h100_80gb_hbm3.json."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json"


def user_tables(environment: Mapping[str, str]) -> Path:
    """Where `nanovllm tune` writes and `choose` looks first, for the package itself may be read-only.

    NANOVLLM_TUNED, or nanovllm/tuned in XDG_CACHE_HOME or ~/.cache; a folder for each operator lies within.
    """
    folder = environment.get(VARIABLE)
    if not folder:
        cache = environment.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        folder = os.path.join(cache, "nanovllm", "tuned")
    return Path(folder) / OPERATOR


def tuned_rows(device: str, environment: Mapping[str, str]) -> tuple[TunedRow, ...]:
    """All measurements of a device, the user's before the package's."""
    name = table_name(device)
    rows = {row.problem: row for folder in (TABLES, user_tables(environment)) for row in load_table(folder / name)}
    return tuple(rows.values())


@functools.lru_cache(maxsize=16)
def load_table(path: Path) -> tuple[TunedRow, ...]:
    """Rows of a table, () where there is none. ValueError for a file that is no table."""
    if not path.exists():
        return ()
    try:
        return tuple(_row(row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of rms_norm_linear ({error}): restore or delete it") from error


def _row(row: dict[str, Any]) -> TunedRow:
    problem = Problem(int(row["m"]), int(row["n"]), int(row["k"]), str(row["dtype"]), bool(row["swiglu"]))
    config = FusionConfig.parse(row["config"])
    if config.launch_pdl:  # it would be launched for callers who promise nothing about their weights
        raise ValueError(f"{config} is a dependent launch, which belongs under 'dependent'")
    dependent = FusionConfig.parse(row["dependent"]) if "dependent" in row else None
    return TunedRow(problem, config, float(row["fused_us"]), float(row["unfused_us"]), dependent)


def lookup(problem: Problem, rows: tuple[TunedRow, ...], *, dependent: bool = False) -> FusionConfig | None:
    """The row of this weight measured at the smallest M that is not below ours; None without one.

    A weight of another shape takes the row of the nearest one (in log N and log K, at most a factor of 2 away) of
    the same dtype and activation. `dependent`: only rows that have a configuration for dependents count, with that one.
    """
    alike = [r for r in rows if (r.problem.dtype, r.problem.swiglu) == (problem.dtype, problem.swiglu)]
    alike = [r for r in alike if not dependent or r.dependent is not None]
    if not alike:
        return None

    def distance(row: TunedRow) -> float:
        return abs(math.log2(row.problem.n / problem.n)) + abs(math.log2(row.problem.k / problem.k))

    nearest = min(distance(row) for row in alike)
    fitting = [row for row in alike if distance(row) == nearest and row.problem.m >= problem.m]
    if nearest > 1 or not fitting:
        return None
    row = min(fitting, key=lambda row: row.problem.m)
    return row.dependent if dependent else row.config


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, device: str, gpu: Gpu, *, dependent: bool = False) -> FusionConfig:
    """What runs `problem` on the GPU named `device`: measured if possible, guessed otherwise."""
    dependent = dependent and gpu.pdl and problem.m <= MAX_PAIR_ROWS  # of more rows no dependent launch is measured
    config = lookup(problem, tuned_rows(device, os.environ), dependent=dependent)
    if config is not None and not config.faults(problem, gpu):
        return config
    return heuristic(problem, gpu, dependent=dependent)
