"""Launch policy of `rms_norm_linear`: which variant, in which shape. Data and pure functions; no torch, no triton.

`choose` asks the measured tables of the device first and the heuristic behind them otherwise. A table is
`rms_norm_linear/<device>.json` in the user's folder (`user_tables`) or in this package's `tuned/`; of a problem in both
the user's row counts. Each row names one measured problem, the fastest configuration found and both times. Where the
fused kernels lost, it says "unfused", so that on a tuned device the operator is never slower than its parts.
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

from nanovllm.kernels.launch_config import Gpu, cdiv, next_power_of_2

OPERATOR = "rms_norm_linear"  # the folder of its tables
TABLES = Path(__file__).resolve().parent / "tuned" / OPERATOR
VARIABLE = "NANOVLLM_TUNED"
ELEMENT_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # dtypes the kernels compute in
MAX_GEMV_ROWS = 8
MAX_GUESSED_ROWS = 16  # above it, only a measurement may say that fusion pays
_THREAD_BYTES = 512  # a thread's share of a GEMV's weight tile: half of its registers


@dataclass(frozen=True, slots=True)
class Problem:
    """[M, K] x [N, K] -> [M, N]; `n` counts outputs, so with SwiGLU the weight has 2 N rows."""

    m: int
    n: int
    k: int
    dtype: str = "bfloat16"
    swiglu: bool = False

    @property
    def weight_rows(self) -> int:
        """Rows of the weight, packed ones counted twice."""
        return 2 * self.n if self.swiglu else self.n

    @property
    def element_size(self) -> int:
        """Bytes an element."""
        return ELEMENT_SIZES[self.dtype]

    def bytes_moved(self, *, fused: bool = True) -> int:
        """Global memory traffic: weight, x and y once; unfused, the normalised x and the packed product as well.

        Bias, residual and gamma are left out: both forms read them once.
        """
        elements = self.weight_rows * self.k + self.m * (self.k + self.n)
        if not fused:
            elements += 2 * self.m * self.k + (2 * self.m * self.weight_rows if self.swiglu else 0)
        return elements * self.element_size


@dataclass(frozen=True, slots=True)
class FusionConfig:
    """One way to run the operator. As text: "unfused", "gemv/16/1024/4", "panel/16/16/64/8" or "tile/16/64/128/4/5".

    gemv: a program holds `block_n` weight rows of all K columns in registers, in chunks of `block_k`.
    panel: the same on tensor cores, for at most `block_m` rows; each warp multiplies `block_k` columns of a chunk.
    tile: products of [block_n, block_k] by [block_k, block_m], `num_stages` of them in flight.
    `block_n` counts weight rows: with SwiGLU a program writes half as many outputs.
    `launch_pdl`: programmatic dependent launch (Hopper, Triton 3.6): the kernel starts before its predecessor ends and
    waits for it as late as it can, a gemv or a panel after asking for its weights. `chain_config` chooses it: a kernel
    alone has nothing to overlap.
    """

    variant: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 1
    launch_pdl: bool = False

    def __str__(self) -> str:
        numbers: tuple[int, ...] = ()
        if self.variant == "gemv":
            numbers = (self.block_n, self.block_k, self.num_warps)
        elif self.variant == "panel":
            numbers = (self.block_m, self.block_n, self.block_k, self.num_warps)
        elif self.variant == "tile":
            numbers = (self.block_m, self.block_n, self.block_k, self.num_warps, self.num_stages)
        return "/".join([self.variant, *map(str, numbers), *(["pdl"] if self.launch_pdl else [])])

    @classmethod
    def parse(cls, text: str) -> FusionConfig:
        """The inverse of `str`; ValueError for text that is none."""
        match = re.fullmatch(
            r"unfused|gemv(?:/\d+){3}(?:/pdl)?|panel(?:/\d+){4}(?:/pdl)?|tile(?:/\d+){5}(?:/pdl)?", text
        )
        if match is None:
            raise ValueError(f'no fusion config: {text!r}; use "unfused", "gemv/16/1024/4" or "tile/16/64/128/4/5"')
        variant, *parts = text.split("/")
        if variant == "unfused":
            return UNFUSED
        launch_pdl = parts[-1] == "pdl"
        numbers = [int(part) for part in parts if part != "pdl"]
        if variant == "gemv":
            block_n, block_k, num_warps = numbers
            return cls("gemv", 0, block_n, block_k, num_warps, launch_pdl=launch_pdl)
        block_m, block_n, block_k, num_warps, num_stages = (*numbers, 1)[:5]
        return cls(variant, block_m, block_n, block_k, num_warps, num_stages, launch_pdl)

    def faults(self, problem: Problem, gpu: Gpu) -> list[str]:
        """Why this configuration cannot run `problem` on `gpu`; [] when it can."""
        if self.variant == "unfused":
            return []
        blocks = {"block_n": self.block_n, "block_k": self.block_k, "num_warps": self.num_warps}
        if self.variant != "gemv":
            blocks["block_m"] = self.block_m
        found = [f"{name}={v} is no power of two" for name, v in blocks.items() if v < 1 or v & (v - 1)]
        if self.num_warps > 32:
            found.append(f"num_warps={self.num_warps} is more than 32")
        if found:
            return found
        if problem.swiglu and self.block_n < 2:
            found.append("swiglu needs block_n >= 2: a gate row and its up row")
        if self.variant == "panel":
            chunk = self.num_warps * self.block_k
            held = self.block_n * cdiv(problem.k, chunk) * chunk * problem.element_size
            if problem.m > self.block_m:
                found.append(f"a panel takes at most block_m={self.block_m} rows, x has {problem.m}")
            if held > _THREAD_BYTES * 32 * self.num_warps:
                found.append(f"a weight tile of {held} bytes does not fit into the registers of {self.num_warps} warps")
            shared = held + held // self.block_n * self.block_m  # all of weight and x, on their way to the tensor cores
            if shared > gpu.shared_memory:
                found.append(f"{shared} bytes of tiles exceed the {gpu.shared_memory} of shared memory")
            smallest = {"block_m": 8, "block_n": 16, "block_k": 16}
            return found + [f"{name} must be at least {v}" for name, v in smallest.items() if getattr(self, name) < v]
        if self.variant == "gemv":
            held = self.block_n * cdiv(problem.k, self.block_k) * self.block_k * problem.element_size
            if problem.m > MAX_GEMV_ROWS:
                found.append(f"a GEMV takes at most {MAX_GEMV_ROWS} rows, x has {problem.m}")
            if held > _THREAD_BYTES * 32 * self.num_warps:
                found.append(f"a weight tile of {held} bytes does not fit into the registers of {self.num_warps} warps")
            return found
        smallest = {"block_m": 16, "block_n": 16, "block_k": 16, "num_stages": 1}
        found += [f"{name} must be at least {low}" for name, low in smallest.items() if getattr(self, name) < low]
        buffers = self.num_stages * (self.block_n + self.block_m) * self.block_k * problem.element_size
        if buffers > gpu.shared_memory:
            found.append(f"{buffers} bytes of tiles exceed the {gpu.shared_memory} of shared memory")
        return found


UNFUSED = FusionConfig("unfused")


def heuristic(problem: Problem, gpu: Gpu) -> FusionConfig:
    """A configuration for any problem, on GPUs and for shapes that nobody measured.

    Prototypes of both kernels on an H100 (Qwen3-0.6B's four linears, CUDA graphs): at one row the CUDA-core form took
    77 % of the time of norm and cuBLAS; at 4 and 16 rows tiles with the norm inside took as long as cuBLAS without
    it (27 us a layer), so the norm was free; at 64 rows they took 1.3 times as long.
    In float32 tiles are never chosen: they sum along K in one chain, and on channels that differ by 1000 that loses
    more than twice what cuBLAS's split sums lose (H100, 2026-11-23).
    """
    if problem.m > (4 if problem.element_size == 4 else MAX_GUESSED_ROWS):
        return UNFUSED
    return _gemv(problem, gpu) if problem.m <= 4 else _tile(problem, gpu)


def _gemv(problem: Problem, gpu: Gpu) -> FusionConfig:
    """About 32 KB of weight a program, less where that would leave SMs without one."""
    lanes = 512 // problem.element_size  # columns a warp reads with one 16-byte load a thread
    num_warps = max(1, min(8, next_power_of_2(problem.k) // lanes))
    block_k = num_warps * lanes
    width = cdiv(problem.k, block_k) * block_k * problem.element_size
    smallest = 2 if problem.swiglu else 1
    block_n = max(smallest, min(16, 1 << max(0, (32768 // width).bit_length() - 1)))
    while block_n > max(4, smallest) and cdiv(problem.weight_rows, block_n) < 2 * gpu.num_sms:
        block_n //= 2
    while width * block_n > _THREAD_BYTES * 32 * num_warps:  # very wide rows
        num_warps *= 2
    return FusionConfig("gemv", 0, block_n, block_k, num_warps)


def _tile(problem: Problem, gpu: Gpu) -> FusionConfig:
    """Enough programs for every SM before wide tiles; as many stages as shared memory takes, up to 5."""
    block_m = max(16, next_power_of_2(problem.m))
    block_n = 64 if cdiv(problem.weight_rows, 64) >= gpu.num_sms else 32
    block_k = 128
    stage = (block_n + block_m) * block_k * problem.element_size
    num_stages = max(2, min(5, gpu.shared_memory // stage))
    return FusionConfig("tile", block_m, block_n, block_k, num_warps=4, num_stages=num_stages)


@dataclass(frozen=True, slots=True)
class TunedRow:
    """One measurement: the fastest configuration of a problem, its time and that of norm + linear (µs)."""

    problem: Problem
    config: FusionConfig
    fused_us: float
    unfused_us: float


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
    return TunedRow(problem, config, float(row["fused_us"]), float(row["unfused_us"]))


def lookup(problem: Problem, rows: tuple[TunedRow, ...]) -> FusionConfig | None:
    """The row of this weight measured at the smallest M that is not below ours; None without one.

    A weight of another shape takes the row of the nearest one (in log N and log K, at most a factor of 2 away) of
    the same dtype and activation.
    """
    alike = [r for r in rows if (r.problem.dtype, r.problem.swiglu) == (problem.dtype, problem.swiglu)]
    if not alike:
        return None

    def distance(row: TunedRow) -> float:
        return abs(math.log2(row.problem.n / problem.n)) + abs(math.log2(row.problem.k / problem.k))

    nearest = min(distance(row) for row in alike)
    fitting = [row for row in alike if distance(row) == nearest and row.problem.m >= problem.m]
    if nearest > 1 or not fitting:
        return None
    return min(fitting, key=lambda row: row.problem.m).config


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, device: str, gpu: Gpu) -> FusionConfig:
    """What runs `problem` on the GPU named `device`: measured if possible, guessed otherwise."""
    config = lookup(problem, tuned_rows(device, os.environ))
    if config is not None and not config.faults(problem, gpu):
        return config
    return heuristic(problem, gpu)
