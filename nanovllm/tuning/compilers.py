"""Triton's disk cache filled from several processes: compiling is most of what tuning costs, and it needs no GPU time.

A worker runs each kernel once on a small problem, which compiles it for this GPU and stores it; the process that
measures then finds it in the cache.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime  # not the built-in one before Python 3.11
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any

from nanovllm.tuning.candidates import Kernel

logger = logging.getLogger(__name__)
WORKER_BYTES = 1 << 30  # GPU memory that a worker may need: its CUDA context and small operands
Job = tuple[Any, ...]  # a module-level function and its arguments


def default_jobs(free_bytes: int) -> int:
    """Workers for this machine: one a core, up to 16, as far as the GPU's free memory goes."""
    return max(1, min(16, os.cpu_count() or 1, free_bytes // WORKER_BYTES))


def compile_kernel(kernel: Kernel) -> str:
    """Compile by running once; "" or the first line of why that failed."""
    import torch

    from nanovllm.tuning.measure import Operands

    operands = Operands(kernel.problem, torch.device("cuda"))
    try:
        operands.fused(kernel.config).call(operands.weights[0])
        torch.cuda.synchronize()
    except Exception as error:  # whatever Triton, ptxas or the driver raise: it becomes the kernel's refusal
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle; a worker compiles alone, without a pool of its own below it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


class Compilers:
    """A pool of `jobs` worker processes, to be used in a `with`. With one job nothing is done beforehand."""

    def __init__(self, jobs: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        if jobs > 1:
            context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
            self._pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker)

    def __enter__(self) -> Compilers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, jobs: Iterable[Job], deadline: float, done: Callable[[Job], object]) -> dict[Job, str]:
        """Run `function(*arguments)` for all jobs, until `deadline` (of `time.monotonic`); answers that are not "".

        Jobs that are not reached, or whose worker died, are left to the process that measures.
        """
        if self._pool is None:
            for job in jobs:
                done(job)
            return {}
        failed: dict[Job, str] = {}
        futures: dict[Future[str | None], Job] = {self._pool.submit(*job): job for job in jobs}
        try:
            for future in as_completed(futures, timeout=max(0.0, min(deadline - time.monotonic(), 1e6))):
                done(futures[future])
                if message := future.result():
                    failed[futures[future]] = message
        except OutOfTime:
            for future in futures:
                future.cancel()
        except BrokenProcessPool as error:
            logger.warning("a compiling process died (%s): the rest is compiled while measuring", error)
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        return failed
