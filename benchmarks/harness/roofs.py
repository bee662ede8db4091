"""What this device can do at most, measured: the denominators of the roofline.

Not a data sheet's peak but what the plainest kernel reaches: a reduction that reads memory no cache holds, and
cuBLAS on a square bfloat16 product.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def read_bandwidth(device: torch.device, megabytes: int = 1024) -> float:
    """Bytes a second of a reduction over memory that no cache holds: what reading weights could reach."""
    data = torch.zeros(megabytes * 2**18, dtype=torch.float32, device=device)
    rows = data.view(-1, 2**18)
    return data.numel() * 4 / _seconds(lambda: rows.sum(1))


def matmul_flops(device: torch.device, size: int = 8192) -> float:
    """FLOP a second of a [size, size] x [size, size] product in bfloat16, random values (zeros draw less power)."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * size**3 / _seconds(lambda: a @ b)


def _seconds(call: Callable[[], torch.Tensor], repeats: int = 4, rounds: int = 9) -> float:
    """Median over rounds of `repeats` calls each, by the device's own clock; one round warms up."""
    times = []
    for turn in range(rounds + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        if turn:
            times.append(start.elapsed_time(end) * 1e-3 / repeats)
    return statistics.median(times)
