"""Launch policy of the decode chain: the linear layers of a step of a few rows, one kernel behind the other under PDL.

Standing alone, a kernel is fastest when it fills the GPU. In a chain it also has to leave room: the next kernel's
programs must become resident beside it, or they cannot ask for their weights early. So tiles here are smaller, threads
fewer and the registers of a thread fuller (256 bytes of weight) than `fusion_config` would choose.

Measured in the chain itself (H200, Triton 3.6.0, bf16, CUDA graphs, 2026-11-24), all other kernels fixed. Pure: no
torch, no triton.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from nanovllm.kernels.fusion_config import UNFUSED, FusionConfig, Problem
from nanovllm.kernels.launch_config import Gpu, cdiv, next_power_of_2

MAX_CHAIN_ROWS = 16
MAX_FLOAT32_ROWS = 4  # tensor-core tiles are not for float32: see `fusion_config.heuristic`
MAX_WEIGHT_BYTES = 20_000_000  # of three rows and more: above it cuBLAS comes closer to the memory's speed
_THREAD_BYTES = 256


@functools.lru_cache(maxsize=1024)
def linear_config(problem: Problem, gpu: Gpu) -> FusionConfig:
    """The configuration of one linear layer of the chain; `problem.m` is at most MAX_CHAIN_ROWS.

    One or two rows: a GEMV reads any weight at the memory's speed (0.6B's LM head, 311 MB: 70.6 and 71.4 us). More
    rows: small weights are a matter of latency and stay fused (0.6B, us a layer, four rows 22.5 against 45.5 unfused,
    sixteen 32.3 against 45.7); for large ones norm and cuBLAS win (Llama-3.2-1B, four rows: 67.5 against 62.7).
    """
    weight_bytes = problem.weight_rows * problem.k * problem.element_size
    if problem.m <= 2 or problem.element_size == 4:
        config = _gemv(problem, gpu)
    elif weight_bytes > MAX_WEIGHT_BYTES:
        return UNFUSED
    else:
        config = _panel(problem)
        many_programs = problem.m > 8 and problem.weight_rows >= 2048  # each of which would read all of x
        if many_programs or config.num_warps > 8 or config.faults(problem, gpu):
            config = _gemv(problem, gpu) if problem.m <= 4 else _tile(problem, gpu)
    return replace(config, launch_pdl=gpu.pdl)


def _gemv(problem: Problem, gpu: Gpu) -> FusionConfig:
    """About 16 KB of weight a program, and three programs an SM or more.

    Qwen3-0.6B, us a layer: QKV 8 rows and 2 warps 17.87, 16 and 4 17.88, 4 and 2 18.05, 8 and 8 above 18.3.
    """
    row = problem.k * problem.element_size
    block_n = max(2, min(16, 1 << max(0, (16384 // row).bit_length() - 1)))
    while block_n > 2 and cdiv(problem.weight_rows, block_n) < 3 * gpu.num_sms:
        block_n //= 2
    num_warps = max(2, min(8, next_power_of_2(cdiv(block_n * row, 32 * _THREAD_BYTES))))
    while block_n * row > 2 * 32 * _THREAD_BYTES * num_warps:  # very wide rows
        num_warps *= 2
    block_k = min(512 * num_warps, next_power_of_2(problem.k))
    while block_n * block_k * 4 > 32 * _THREAD_BYTES * num_warps:
        block_k //= 2
    return FusionConfig("gemv", 0, block_n, block_k, num_warps)


def _panel(problem: Problem) -> FusionConfig:
    """16 weight rows a program, K spread over as many warps as hold them.

    Four rows of Qwen3-0.6B, us a layer: output projection 23.4 (tile 28, gemv above 24.9), gate_up 25.0 (gemv 29).
    """
    tile = 16 * problem.k * problem.element_size
    num_warps = max(4, next_power_of_2(cdiv(tile, 32 * _THREAD_BYTES)))
    block_k = 64
    while block_k > 16 and cdiv(problem.k, block_k * num_warps) * block_k * num_warps > 1.2 * problem.k:
        block_k //= 2
    return FusionConfig("panel", 8 if problem.m <= 8 else 16, 16, block_k, num_warps)


def _tile(problem: Problem, gpu: Gpu) -> FusionConfig:
    """64 weight rows, which come through the L2 cache.

    Sixteen rows of Qwen3-0.6B, us a layer: QKV 33.8 with 256 columns at a time, 35.8 to 39 with fewer; down projection
    32.4 with 128, 33.8 with 256.
    """
    block_k, num_stages = (256, 3) if problem.k <= 2048 else (128, 4)
    config = FusionConfig("tile", 16, 64, block_k, 4, num_stages)
    return config if not config.faults(problem, gpu) else FusionConfig("tile", 16, 32, 64, 4, 3)
