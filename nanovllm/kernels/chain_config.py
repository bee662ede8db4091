"""Launch policy of the decode chain: the linear layers of a step of a few rows, one kernel behind the other under PDL.

Standing alone, a kernel is fastest when it fills the GPU. In a chain it also has to leave room: the next kernel's
programs must become resident beside it, or they cannot ask for their weights early. The shapes of `fusion_config`'s
heuristic are those that were fastest in the chain; what is decided here is who takes part, and when the next may start.

Above MAX_FUSED_ROWS the norm is a kernel of its own again, with a tile behind it that has asked for its weights by
then; output and down projections are narrow tiles, if those fit the GPU at once, else cuBLAS. Without dependent
launches norms and cuBLAS do all of it.

Measured in the chain itself (H100, Triton 3.6.0, bf16, CUDA graphs, 2026-11-25). Pure: no torch, no triton.
"""

from __future__ import annotations

import functools

from nanovllm.kernels.fusion_config import (
    MAX_FLOAT32_ROWS,
    MAX_PAIR_ROWS,
    MAX_PANEL_ROWS,
    UNFUSED,
    FusionConfig,
    Problem,
    heuristic,
)
from nanovllm.kernels.launch_config import Gpu, cdiv, next_power_of_2

MAX_CHAIN_ROWS = MAX_PAIR_ROWS
MAX_FUSED_ROWS = MAX_PANEL_ROWS
_UNFUSED_CHAIN_ROWS = 32  # without dependent launches, what is left above MAX_FUSED_ROWS is the chain's attention


def chain_rows(element_size: int, gpu: Gpu) -> int:
    """The most rows of a step that gains by the chain."""
    if element_size == 4:
        return MAX_FLOAT32_ROWS
    return MAX_CHAIN_ROWS if gpu.pdl else _UNFUSED_CHAIN_ROWS


@functools.lru_cache(maxsize=1024)
def linear_config(problem: Problem, gpu: Gpu, *, norm: bool = True) -> FusionConfig:
    """The configuration of one linear layer of the chain; `problem.m` is at most MAX_CHAIN_ROWS.

    norm: a norm goes before it; otherwise it adds to the residual stream.

    One row: a GEMV reads any weight at the memory's speed (0.6B's LM head, 311 MB: 102 us). More rows: tensor cores
    keep a layer's time nearly the same (four linears of 0.6B, us: one row 13.2, two 15.5, eight 16.4, sixteen 21.4),
    and read large weights faster than norm and cuBLAS do (2026-11-26; layer with gate_up and down by panels instead, at
    4 / 8 / 16 rows: Qwen3-4B 90.5 / 91.8 / 94.1 for 96.2 / 98.1 / 98.1, Qwen3-8B 146 / 150 / 150 for 157 / 160 / 161).
    The next kernel starts at once, or above eight rows when x has been asked for: a layer of sixteen rows takes 30.1 us
    instead of 33.9 (of eight rows 29.7 instead of 26.4).
    """
    if not norm and problem.m > MAX_FUSED_ROWS:
        return _residual_tile(problem, gpu)
    return heuristic(problem, gpu, dependent=True)


def _residual_tile(problem: Problem, gpu: Gpu) -> FusionConfig:
    """17 rows and more, back to the residual stream: 16 rows of the weight a program, if one program an SM does it.

    Layer at 256 keys, us at 24 / 32 / 48 / 64 rows (H100, 2026-11-26), with cuBLAS and with these: Qwen3-0.6B 40.8 /
    42.9 / 51.7 / 56.0 and 36.8 / 39.0 / 47.3 / 52.1, tiles of 32 by 128 40.0 / 41.4 / 50.3 / 54.8; Llama-3.2-1B 67.2 /
    69.3 / 74.4 / 79.7 and 62.1 / 64.4 / 69.4 / 75.4. Qwen3-4B, two programs an SM: 103.6 / 106.0 / 118.8 / 123.1 and
    118.9 / 122.9 / 137.8 / 142.7, hence cuBLAS there. In float32 tiles are never chosen (`heuristic`).
    """
    if not gpu.pdl or problem.element_size == 4 or cdiv(problem.weight_rows, 16) > gpu.num_sms:
        return UNFUSED
    block_k = min(256, max(16, next_power_of_2(problem.k)))
    stages = min(4, gpu.shared_memory // ((64 + 16) * block_k * problem.element_size))
    tile = FusionConfig("tile", 64, 16, block_k, 4, max(1, stages), launch_pdl=True)
    return UNFUSED if tile.faults(problem, gpu) else tile
