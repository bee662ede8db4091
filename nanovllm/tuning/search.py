"""All cases in turn: compile what a batch needs in parallel, then measure; whatever is done is handed out at once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from nanovllm.kernels.fusion_config import FusionConfig
from nanovllm.kernels.launch_config import Gpu
from nanovllm.tuning.candidates import Kernel, candidates, kernel_of
from nanovllm.tuning.cases import Case
from nanovllm.tuning.compilers import Compilers, Job, compile_kernel
from nanovllm.tuning.measure import Operands, Result, Timer, Variant, graph_timer, measure, rotate_bytes


@dataclass(frozen=True)
class Stage:
    """Cases of one number of rows, and the kernels that no stage before needed."""

    cases: list[tuple[Case, list[FusionConfig]]]
    kernels: list[Kernel]

    @property
    def steps(self) -> int:
        """Kernels to compile and to time: what a progress bar counts."""
        return len(self.kernels) + sum(len(configs) + 1 for _, configs in self.cases)


def plan(cases: Sequence[Case], gpu: Gpu) -> list[Stage]:
    """Stages in the order of the cases. Of folded cases only norm + linear are measured: kernels gain nothing by it."""
    stages: list[Stage] = []
    known: set[Kernel] = set()
    for _, group in itertools.groupby(cases, key=lambda case: case.problem.m):
        tried = [(case, [] if case.folded else candidates(case.problem, gpu)) for case in group]
        kernels = dict.fromkeys(kernel_of(case.problem, config) for case, configs in tried for config in configs)
        stages.append(Stage(tried, [kernel for kernel in kernels if kernel not in known]))
        known.update(kernels)
    return stages


@dataclass(frozen=True)
class Extra:
    """What a benchmark measures beside the candidates. `warm`, a module-level function, compiles it in a worker."""

    variants: Callable[[Operands], list[Variant]]
    warm: Callable[[Case], None]


def search(
    stages: Sequence[Stage],
    device: torch.device,
    *,
    jobs: int,
    time_limit: float = float("inf"),
    timer: Timer = graph_timer,
    extra: Extra | None = None,
    progress: Callable[[int], object] = lambda steps: None,
) -> Iterator[Result]:
    """Results as they come. After `time_limit` seconds no case is begun. `progress` is told of the steps done."""
    deadline = time.monotonic() + time_limit
    rotate = rotate_bytes(device) if device.type == "cuda" else 0
    refused: dict[Kernel, str] = {}
    with Compilers(jobs) as compilers:
        for stage in stages:
            work: list[Job] = [(compile_kernel, kernel) for kernel in stage.kernels]
            if extra is not None:
                work += [(extra.warm, case) for case, _ in stage.cases]
            failed = compilers.run(work, deadline, lambda job: progress(job[0] is compile_kernel))
            refused |= {job[1]: message for job, message in failed.items() if job[0] is compile_kernel}
            for case, configs in stage.cases:
                if time.monotonic() >= deadline:
                    return
                sound = [config for config in configs if kernel_of(case.problem, config) not in refused]
                operands = Operands(case.problem, device, rotate, folded=case.folded)
                baselines = [] if extra is None else extra.variants(operands)
                result = measure(case, operands, sound, timer, baselines=baselines)
                for config in set(configs) - set(sound):
                    result.refused[str(config)] = refused[kernel_of(case.problem, config)]
                progress(len(configs) + 1)
                yield result
