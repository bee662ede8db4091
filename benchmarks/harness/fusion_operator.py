"""RMSNorm+Linear on one GPU: fused against its parts, for the linears of the models in `models.SHAPES`.

How it measures: weights are rotated through copies of three times the L2 cache; the calls of one variant form one
CUDA graph; all variants of a problem are replayed in turn, and a time is the median over the turns. A configuration is
timed only after its result has passed the gate: at most twice the error that norm and cuBLAS make against float64.

Every problem is tried with `candidates`, so that measuring is also tuning: `table` keeps the winners.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from harness.models import SHAPES
from nanovllm.kernels import reference
from nanovllm.kernels.fusion_config import UNFUSED, FusionConfig, Problem
from nanovllm.kernels.jit import gpu_of
from nanovllm.kernels.launch_config import next_power_of_2
from nanovllm.kernels.rms_norm_linear_fusion import rms_norm_linear

ROTATE_BYTES = 150e6  # an H100 caches 50 MB
EPS = 1e-6
MARGIN = 0.99  # a table takes a fused kernel that needs at most this share of the unfused time
Call = Callable[[torch.Tensor], torch.Tensor]  # takes the weight of its turn


@dataclass(frozen=True)
class Case:
    """One linear of one model at one batch."""

    model: str
    layer: str
    problem: Problem


@dataclass
class Result:
    """Microseconds a call: median, and the 20th and 80th percentile. `refused`: what the gate or the compiler said."""

    case: Case
    times: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def best(self) -> str:
        """The fastest fused configuration, or "unfused" if none passed."""
        fused = {name: time for name, time in self.times.items() if "/" in name}
        return min(fused, key=lambda name: fused[name][0], default="unfused")

    def choice(self) -> str:
        """What the table should say."""
        best = self.best()
        return best if self.times[best][0] <= MARGIN * self.times["unfused"][0] else "unfused"

    def us(self, name: str) -> float:
        """The median of one variant; of "fused", what the table chose."""
        return self.times[self.choice() if name == "fused" else name][0]


def cases(models: list[str], rows: list[int], dtype: str = "bfloat16") -> Iterator[Case]:
    """QKV, gate_up as a bare linear and gate_up with SwiGLU of each model; models of equal shapes are not repeated."""
    for model in models:
        shape = SHAPES[model]
        hidden, inner = shape["hidden_size"], shape["intermediate_size"]
        qkv = (shape["num_attention_heads"] + 2 * shape["num_key_value_heads"]) * shape["head_dim"]
        for m in rows:
            yield Case(model, "qkv", Problem(m, qkv, hidden, dtype))
            yield Case(model, "gate_up", Problem(m, 2 * inner, hidden, dtype))
            yield Case(model, "gate_up+swiglu", Problem(m, inner, hidden, dtype, swiglu=True))


def candidates(problem: Problem, device: torch.device) -> list[FusionConfig]:
    """Configurations worth trying, those that cannot run left out."""
    found: list[FusionConfig] = []
    if problem.m <= 4:
        lanes = 512 // problem.element_size  # columns of one 16-byte load a thread
        for warps, block_n in itertools.product((2, 4, 8), (2, 4, 8, 16)):
            if warps * lanes <= next_power_of_2(problem.k):
                found.append(FusionConfig("gemv", 0, block_n, warps * lanes, warps))
    if problem.m >= 2:
        block_m = max(16, next_power_of_2(problem.m))
        shapes = [(16, 256, 4, 4), (32, 128, 4, 5), (32, 256, 4, 4), (64, 64, 4, 6), (64, 128, 4, 4), (64, 128, 8, 4)]
        shapes += [(16, 512, 4, 3), (64, 256, 4, 3)] if block_m == 16 else [(128, 64, 4, 4), (128, 64, 8, 4)]
        shapes += [(128, 128, 8, 3)] if block_m == 64 else [(32, 128, 2, 5)]
        found += [FusionConfig("tile", block_m, *shape) for shape in shapes]
    gpu = gpu_of(device)
    return [config for config in found if not config.faults(problem, gpu)]


class Operands:
    """x, gamma and enough copies of the weight to defeat the cache."""

    def __init__(self, problem: Problem, device: torch.device, rotate_bytes: float = ROTATE_BYTES) -> None:
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, problem.dtype)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, generator=generator)

        self.problem = problem
        self.x = normal(problem.m, problem.k).to(dtype)
        self.gamma = (1 + 0.3 * normal(problem.k)).to(dtype)
        weight = (normal(problem.weight_rows, problem.k) / problem.k**0.5).to(dtype)
        copies = max(1, int(-(-rotate_bytes // (weight.numel() * weight.element_size()))))
        self.weights = [weight, *(weight.clone() for _ in range(copies - 1))]

    @property
    def activation(self) -> str | None:
        return "swiglu" if self.problem.swiglu else None

    def truth(self) -> torch.Tensor:
        """float64."""
        wide = (t.double() for t in (self.x, self.weights[0], self.gamma))
        return reference.rms_norm_linear(*wide, EPS, activation=self.activation)

    def fused(self, config: FusionConfig) -> Call:
        return lambda w: rms_norm_linear(self.x, w, self.gamma, EPS, activation=self.activation, config=config)

    def baselines(self) -> dict[str, Call]:
        """The bound (GEMM alone), our own parts, and the compiled norm with cuBLAS; SwiGLU costs its own kernel."""
        norm, act = _compiled(_norm), _compiled(_swiglu) if self.problem.swiglu else (lambda y: y)
        normed = reference.rms_norm(self.x, self.gamma, EPS)
        return {
            "gemm": lambda w: F.linear(normed, w),
            "unfused": self.fused(UNFUSED),
            "compiled": lambda w: act(F.linear(norm(self.x, self.gamma), w)),
        }


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def _swiglu(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Compiled for exactly the shapes it meets: the baseline at its best."""
    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(function, dynamic=False)


def capture(call: Call, weights: list[torch.Tensor], calls: int) -> torch.cuda.CUDAGraph:
    """One graph of `calls` calls, the weights in turn."""
    call(weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(weights[i % len(weights)])
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    """Microseconds a call of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / calls


def relative_error(y: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square of the error over that of the truth; NaN where y has one."""
    return ((y.double() - truth).square().mean() / truth.square().mean()).sqrt().item()


def measure(case: Case, device: torch.device, rounds: int = 15, finalists: int = 3) -> Result:
    """Gate and time all candidates, then the fastest few and the baselines again, in turn."""
    operands, result = Operands(case.problem, device), Result(case)
    weights = operands.weights
    calls = len(weights) * -(-16 // len(weights))
    truth = operands.truth()
    allowed = 2 * relative_error(operands.fused(UNFUSED)(weights[0]), truth)
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for config in candidates(case.problem, device):
        call = operands.fused(config)
        error = relative_error(call(weights[0]), truth)
        if not error <= allowed:
            result.refused[str(config)] = f"relative error {error:.2e}, allowed {allowed:.2e}"
            continue
        graphs[str(config)] = capture(call, weights, calls)
    first = {name: min(replay_us(graph, calls) for _ in range(4)) for name, graph in graphs.items()}
    kept = sorted(first, key=lambda name: first[name])[:finalists]
    graphs = {name: graphs[name] for name in kept}
    graphs |= {name: capture(call, weights, calls) for name, call in operands.baselines().items()}
    turns: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 1):
        for name, graph in graphs.items():
            us = replay_us(graph, calls)
            if turn:  # the first warms up
                turns[name].append(us)
    for name, times in turns.items():
        low, *_, high = statistics.quantiles(times, n=5)
        result.times[name] = (statistics.median(times), low, high)
    return result


def read_bandwidth(device: torch.device, megabytes: int = 1024) -> float:
    """Bytes a second of a reduction over memory that no cache holds: what reading weights could reach."""
    data = torch.zeros(megabytes * 2**18, dtype=torch.float32, device=device)
    graph = capture(lambda w: w.view(-1, 2**18).sum(1), [data], 1)
    return data.numel() * 4 / (statistics.median(replay_us(graph, 1) for _ in range(9)) * 1e-6)


def table(results: list[Result], provenance: dict[str, str], command: str) -> dict[str, Any]:
    """The JSON that `fusion_config.load_table` reads."""
    rows = {}
    for result in results:
        p, best = result.case.problem, result.best()
        rows[p] = dict(
            m=p.m, n=p.n, k=p.k, dtype=p.dtype, swiglu=p.swiglu, config=result.choice(),
            fused_us=round(result.times[best][0], 3), unfused_us=round(result.us("unfused"), 3),
        )  # fmt: skip
    method = f"us a call in a CUDA graph, weights rotated through {ROTATE_BYTES / 1e6:.0f} MB, median of the turns"
    return {**provenance, "command": command, "method": method, "rows": list(rows.values())}
