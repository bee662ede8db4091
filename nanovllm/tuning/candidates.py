"""Which configurations are worth a measurement, and which problem compiles them most cheaply. Pure.

Few enough that a case takes about a second. Gemvs and panels are chosen by what decides there, bytes of weight in
flight: a memory of 3.35 TB/s and some 700 ns of latency (H100) needs 2.3 MB on the way, 18 KB an SM, and as much again
to hide the arithmetic; more than that only costs occupancy. Tiles and pairs are those that won in trials.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from nanovllm.kernels.fusion_config import MAX_GEMV_ROWS, MAX_PANEL_ROWS, FusionConfig, Problem
from nanovllm.kernels.launch_config import Gpu, cdiv, next_power_of_2

MIN_TILE_ROWS = 16  # below, panels, which hold the same weights without padding x to 16 rows
MAX_TILE_ROWS = 64  # above, a few large tiles are tried, mostly to show that cuBLAS is better
MAX_UNROLLED = 32  # chunks of a row in a panel: compile time grows with their square, 64 take a quarter of a minute
MAX_ROWS = 128  # above, nothing is tried: the product is bound by arithmetic, and large tiles lost at 128 (H200)
MAX_TUNED_GEMV_ROWS = 4  # of 16-bit numbers, alone; for more of them panels won everywhere (H100, 2026-11-26)
MAX_DEPENDENT_GEMV_ROWS = 2  # likewise as dependents
_Blocks = tuple[int, int, int, int]  # block_n, block_k, warps, stages
_LARGE_TILES = ((64, 128, 64, 4, 4), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4))
# Of some 40 pairs, and of the tiles that had been best alone, those that were best somewhere or within 1 % of it (the
# models of `cases.SHAPES`, 16 to 64 rows, H100, 2026-11-26); and smaller ones.
_TILES: tuple[_Blocks, ...] = (
    (64, 256, 4, 3), (128, 128, 8, 3), (64, 128, 8, 3), (64, 128, 4, 3), (64, 64, 4, 4), (128, 64, 8, 5),
    (32, 256, 4, 3), (32, 128, 4, 4), (16, 256, 4, 4),
)  # fmt: skip
_PAIRS: tuple[_Blocks, ...] = (
    (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 4, 7), (64, 256, 4, 4), (64, 64, 4, 3), (64, 64, 4, 4),
    (128, 128, 4, 4), (128, 128, 8, 4), (128, 64, 4, 4),
)  # fmt: skip
_NARROW_PAIRS: tuple[_Blocks, ...] = ((32, 128, 4, 5), (32, 256, 4, 4), (32, 128, 4, 7))  # against 64 rows of x


def candidates(problem: Problem, gpu: Gpu) -> list[FusionConfig]:
    """Configurations to try for `problem`, all of which can run: on their own, and as dependents where the GPU can.

    None for more than MAX_ROWS rows.
    """
    m, size = problem.m, problem.element_size
    found: list[FusionConfig] = []
    if m <= (MAX_GEMV_ROWS if size == 4 else MAX_TUNED_GEMV_ROWS):
        found += _gemvs(problem)
    if size == 2 and 1 < m <= MAX_PANEL_ROWS:
        found += _panels(problem)
    if MIN_TILE_ROWS <= m <= MAX_TILE_ROWS:
        block_m = next_power_of_2(m)
        found += _blocked("tile", _TILES, block_m, problem, gpu)
        if gpu.pdl and size == 2:
            found += _blocked("pair", _PAIRS, block_m, problem, gpu)
            found += _blocked("pair", _NARROW_PAIRS, 64, problem, gpu)
    elif MAX_TILE_ROWS < m <= MAX_ROWS:
        found += [FusionConfig("tile", *blocks) for blocks in _LARGE_TILES]
    if gpu.pdl and m <= MAX_TILE_ROWS:
        few = size == 4 or m <= MAX_DEPENDENT_GEMV_ROWS
        alike = [config for config in found if few or config.variant != "gemv"]
        found += [dataclasses.replace(config, launch_pdl=True) for config in alike]
        late = [config for config in found if config.launch_pdl and config.variant == "panel"]
        found += [dataclasses.replace(config, late_trigger=True) for config in late]
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


def _blocked(variant: str, blocks: Iterable[_Blocks], block_m: int, problem: Problem, gpu: Gpu) -> list[FusionConfig]:
    """Blocks of which a row has at least two, with as many of their stages as there are steps and room."""
    found = []
    for block_n, block_k, warps, stages in blocks:
        steps = cdiv(problem.k, block_k)
        room = gpu.shared_memory // ((block_n + block_m) * block_k * problem.element_size)
        if steps >= 2 and room >= 2:
            found.append(FusionConfig(variant, block_m, block_n, block_k, warps, min(stages, steps + 1, room)))
    return found


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compilation: a configuration and the smallest problem that needs it."""

    problem: Problem
    config: FusionConfig


def kernel_of(problem: Problem, config: FusionConfig) -> Kernel:
    """What `problem` compiles for `config`; problems with equal answers share the kernel.

    A GEMV is specialised for M and K, a panel for K, a tile only for whether its columns divide K; none for N.
    The norm of a pair is not counted: it is small, and compiles for each K while it is measured.
    """
    m, k = problem.m, problem.k
    if config.variant != "gemv":
        m = config.block_m
    if config.variant in ("tile", "pair") and k % config.block_k == 0:
        k = 1024
    return Kernel(Problem(m, min(problem.n, 256), k, problem.dtype, problem.swiglu), config)
