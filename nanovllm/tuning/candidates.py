"""Which configurations are worth a measurement, and which problem compiles them most cheaply. Pure.

Few enough that a case takes about a second, and chosen by what decides here: bytes of weight in flight. A memory of
3.35 TB/s and some 700 ns of latency (H100) needs 2.3 MB on the way, 18 KB an SM, and as much again to hide the
arithmetic; more than that only costs occupancy.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

from nanovllm.kernels.fusion_config import MAX_GEMV_ROWS, MAX_PANEL_ROWS, FusionConfig, Problem
from nanovllm.kernels.launch_config import Gpu, cdiv, next_power_of_2

MIN_TILE_ROWS = 16  # below, panels, which hold the same weights without padding x to 16 rows
MAX_TILE_ROWS = 64  # above, a few large tiles are tried, mostly to show that cuBLAS is better
MAX_UNROLLED = 32  # chunks of a row in a panel: compile time grows with their square, 64 take a quarter of a minute
MAX_ROWS = 128  # above, nothing is tried: the product is bound by arithmetic, and large tiles lost at 128 (H200)
FLIGHT = 32 * 1024  # bytes of weight per SM that a pipeline should keep on the way
_LARGE_TILES = ((64, 128, 64, 4, 4), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4))


def candidates(problem: Problem, gpu: Gpu, *, pdl: bool = False) -> list[FusionConfig]:
    """Configurations to try for `problem`, all of which can run; `pdl` asks for dependent launches.

    None for more than MAX_ROWS rows.
    """
    found: list[FusionConfig] = []
    if problem.m <= MAX_GEMV_ROWS:
        found += _gemvs(problem)
    if problem.element_size == 2 and problem.m <= MAX_PANEL_ROWS:
        found += _panels(problem)
    if MIN_TILE_ROWS <= problem.m <= MAX_TILE_ROWS:
        found += _tiles(problem, gpu)
    elif MAX_TILE_ROWS < problem.m <= MAX_ROWS:
        found += [FusionConfig("tile", *blocks) for blocks in _LARGE_TILES]
    if pdl:
        found = [dataclasses.replace(config, launch_pdl=True) for config in found]
    return [config for config in dict.fromkeys(found) if not config.faults(problem, gpu)]


def _gemvs(problem: Problem) -> list[FusionConfig]:
    """A chunk is one 16-byte load a lane; a warp has as many rows as make it hold 64 to 512 bytes of weight a lane."""
    block_k = min(512 // problem.element_size, max(32, next_power_of_2(problem.k)))
    row = cdiv(problem.k, block_k) * block_k * problem.element_size
    found = []
    for warps, rows in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
        if rows >= 1 + problem.swiglu and (rows == 1 + problem.swiglu or 64 <= rows * row // 32 <= 512):
            found.append(FusionConfig("gemv", 0, rows * warps, block_k, warps))
    return found


def _panels(problem: Problem) -> list[FusionConfig]:
    """All of K in flight where registers hold it, or a window of it; 128 to 512 bytes of weight a thread."""
    found = []
    block_m = max(8, next_power_of_2(problem.m))
    for block_n, warps in itertools.product((8, 16, 32), (2, 4, 8)):
        width = 32 * warps
        whole = cdiv(problem.k, width)
        if whole > MAX_UNROLLED:
            continue
        for chunks in {whole, *(c for c in (4, 8, 16) if c < whole)}:
            if 128 <= block_n * chunks * 2 <= 512 or chunks == whole and block_n * chunks * 2 < 128:
                found.append(FusionConfig("panel", block_m, block_n, chunks * width, warps))
    return found


def _tiles(problem: Problem, gpu: Gpu) -> list[FusionConfig]:
    """Every tile whose products divide among its warps, with as many stages as keep enough of the weight in flight."""
    block_m, size = max(16, next_power_of_2(problem.m)), problem.element_size
    found = []
    for block_n, block_k, warps in itertools.product((16, 32, 64, 128), (64, 128, 256), (4, 8)):
        steps, programs = cdiv(problem.k, block_k), cdiv(problem.weight_rows, block_n)
        if steps < 2:
            continue
        # A warp's share of the tile: not so much that registers spill, not so little that warps repeat work.
        if not 128 <= block_n * block_m // warps <= 2048 and block_n * block_k // warps < 2048:
            continue
        if block_n > 32 and programs < gpu.num_sms // 3:
            continue
        stage = (block_n + block_m) * block_k * size
        most = max(2, min(7, gpu.shared_memory // stage, steps))
        for flight in (FLIGHT, 2 * FLIGHT):
            stages = min(most, _stages(flight, block_n * block_k * size, stage, programs, gpu))
            found.append(FusionConfig("tile", block_m, block_n, block_k, warps, stages))
    return found


def _stages(flight: int, weight_bytes: int, stage_bytes: int, programs: int, gpu: Gpu) -> int:
    """Fewest stages (2 to 7) with which the programs of one SM keep `flight` bytes of the weight on the way."""
    for stages in range(2, 7):
        resident = max(1, min(cdiv(programs, gpu.num_sms), gpu.shared_memory // (stages * stage_bytes)))
        if resident * (stages - 1) * weight_bytes >= flight:
            return stages
    return 7


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compilation: a configuration and the smallest problem that needs it."""

    problem: Problem
    config: FusionConfig


def kernel_of(problem: Problem, config: FusionConfig) -> Kernel:
    """What `problem` compiles for `config`; problems with equal answers share the kernel.

    A GEMV is specialised for M and K, a panel for K, a tile only for whether its columns divide K; none for N. A
    dependent tile also for the length of a row, in which it prefetches.
    """
    m, k = problem.m, problem.k
    if config.variant != "gemv":
        m = config.block_m
    if config.variant == "tile" and k % config.block_k == 0 and not config.launch_pdl:
        k = 1024
    return Kernel(Problem(m, min(problem.n, 256), k, problem.dtype, problem.swiglu), config)
