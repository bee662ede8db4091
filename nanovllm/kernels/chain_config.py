"""Launch policy of the decode chain: the linear layers of a step of a few rows, one kernel behind the other under PDL.

Standing alone, a kernel is fastest when it fills the GPU. In a chain it also has to leave room: the next kernel's
programs must become resident beside it, or they cannot ask for their weights early. The shapes of `fusion_config`'s
heuristic are those that were fastest in the chain; what is decided here is who takes part, and when the next may start.

Above MAX_DEPENDENT_ROWS no such kernel is fast. Up to MAX_CHAIN_ROWS the chain still pays by its attention, and by what
the operator's table knows to be fast alone: with it a layer of 32 rows takes 48.8 us instead of 53.6 at 256 keys, 82
instead of 88.5 at 1,024 (Qwen3-0.6B). 64 rows gain nothing: 66.1 for 63.7, 130 for 131.

Measured in the chain itself (H100, Triton 3.6.0, bf16, CUDA graphs, 2026-11-25). Pure: no torch, no triton.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from nanovllm.kernels.fusion_config import (
    MAX_FLOAT32_ROWS,
    MAX_PANEL_ROWS,
    UNFUSED,
    FusionConfig,
    Problem,
    gemv_config,
    panel_config,
)
from nanovllm.kernels.launch_config import Gpu

MAX_CHAIN_ROWS = 32
MAX_DEPENDENT_ROWS = MAX_PANEL_ROWS
_EARLY_ROWS = 8  # above it x itself is large, and would travel behind the next kernel's weights


@functools.lru_cache(maxsize=1024)
def linear_config(problem: Problem, gpu: Gpu) -> FusionConfig:
    """The configuration of one linear layer of the chain; `problem.m` is at most MAX_DEPENDENT_ROWS.

    One row: a GEMV reads any weight at the memory's speed (0.6B's LM head, 311 MB: 102 us). More rows: tensor cores
    keep a layer's time nearly the same (four linears of 0.6B, us: one row 13.2, two 15.5, eight 16.4, sixteen 21.4),
    and read large weights faster than norm and cuBLAS do (2026-11-26; layer with gate_up and down by panels instead, at
    4 / 8 / 16 rows: Qwen3-4B 90.5 / 91.8 / 94.1 for 96.2 / 98.1 / 98.1, Qwen3-8B 146 / 150 / 150 for 157 / 160 / 161).
    The next kernel starts at once, or above eight rows when x has been asked for: a layer of sixteen rows takes 30.1 us
    instead of 33.9 (of eight rows 29.7 instead of 26.4).
    """
    if problem.m == 1 or problem.element_size == 4:
        config = gemv_config(problem, gpu) if problem.m <= MAX_FLOAT32_ROWS else UNFUSED
    else:
        config = panel_config(problem)
    if config.variant == "unfused" or config.faults(problem, gpu):
        return UNFUSED
    return replace(config, launch_pdl=gpu.pdl, late_trigger=gpu.pdl and problem.m > _EARLY_ROWS)
