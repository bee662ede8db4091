"""One problem on one GPU: which candidates are right, and how long each takes.

Weights are rotated through copies of three times the L2 cache; the calls of one variant form one CUDA graph. A
configuration is timed only after its result has passed the gate: at most twice the error that PyTorch makes in the
same dtype, against float64. All that pass are timed cheaply; the best few and the baselines again, in turn, so that a
drifting clock meets all of them. A time is the median over the turns, a speed-up that of the ratios within a turn.

The timer is an argument: what decides between candidates is tested with one that reads a clock of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from nanovllm.kernels import reference
from nanovllm.kernels.fusion_config import UNFUSED, FusionConfig, Problem
from nanovllm.kernels.launch_config import cdiv
from nanovllm.kernels.rms_norm_linear_fusion import rms_norm_linear
from nanovllm.tuning.cases import Case
from nanovllm.tuning.turns import percentiles, take_turns, times_as_fast

EPS = 1e-6
MARGIN = 0.99  # a table takes a fused kernel that needs at most this share of the unfused time
TOLERANCE = 2.0  # error allowed, as a multiple of PyTorch's
GATED_ROWS = 256  # rows of x that are compared with float64, the first and the last among them
COARSE_US, FINE_US = 100.0, 400.0  # how long a replay should take, so that events resolve it to 1 %
Call = Callable[[torch.Tensor], torch.Tensor]  # takes the weight of its turn
Replay = Callable[[], float]  # microseconds a call


@dataclass(frozen=True)
class Variant:
    """One way to compute a problem, under the name that its time gets."""

    name: str
    call: Call


Timer = Callable[[Variant, Sequence[torch.Tensor], int], Replay]  # variant, its weights in turn, calls a replay


@dataclass
class Result:
    """Microseconds a call in each turn. `refused`: what the gate or the compiler said."""

    case: Case
    turns: dict[str, Sequence[float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def times(self) -> dict[str, tuple[float, float, float]]:
        """Microseconds a call: median, and the 20th and 80th percentile."""
        return {name: percentiles(turns) for name, turns in self.turns.items()}

    def best(self, *, dependent: bool = False) -> str:
        """The fastest fused configuration, or "unfused" if none passed. `dependent`: it may be a dependent launch."""
        allowed = [name for name in self.turns if "/" in name and (dependent or not is_dependent(name))]
        return max(allowed, key=lambda name: self.speedup(name, "unfused"), default="unfused")

    def choice(self, *, dependent: bool = False) -> str:
        """What the table should say."""
        best = self.best(dependent=dependent)
        return best if best == "unfused" or self.speedup(best, "unfused") >= 1 / MARGIN else "unfused"

    @property
    def has_dependents(self) -> bool:
        """Whether dependent launches were measured: where the GPU knows them."""
        return any(map(is_dependent, (*self.turns, *self.refused)))

    def us(self, name: str) -> float:
        """The median of one variant; of "fused" and "dependent", what the table chose."""
        return percentiles(self.turns[self._chosen(name)])[0]

    def speedup(self, name: str, over: str) -> float:
        """How many times as fast as `over` it was, in the same turn."""
        return times_as_fast(self.turns[self._chosen(name)], self.turns[over])

    def _chosen(self, name: str) -> str:
        return self.choice(dependent=name == "dependent") if name in ("fused", "dependent") else name


def is_dependent(config: str) -> bool:
    """Whether a configuration's text asks for a dependent launch."""
    return config.endswith(("/pdl", "/late"))


class Operands:
    """x, gamma and enough copies of the weight to defeat the cache. `folded`: gamma is in the weight, and None here."""

    def __init__(self, problem: Problem, device: torch.device, rotate_bytes: int = 0, *, folded: bool = False) -> None:
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, problem.dtype)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, generator=generator)

        self.problem = problem
        self.x = normal(problem.m, problem.k).to(dtype)
        self.gamma = None if folded else (1 + 0.3 * normal(problem.k)).to(dtype)
        weight = torch.empty(problem.weight_rows, problem.k, dtype=dtype, device=device)
        for part in weight.split(16384):  # a vocabulary in float32 at once would need as much again twice
            part.copy_(normal(*part.shape) / problem.k**0.5)
        # Two at least: the next call of a dependent begins while this one ends, and must not find its own last bytes.
        copies = max(2 if rotate_bytes else 1, cdiv(rotate_bytes, weight.numel() * weight.element_size()))
        self.weights = [weight, *(weight.clone() for _ in range(copies - 1))]
        self.sample = torch.linspace(0, problem.m - 1, min(problem.m, GATED_ROWS), device=device).long()

    @property
    def activation(self) -> str | None:
        """As `rms_norm_linear` takes it."""
        return "swiglu" if self.problem.swiglu else None

    def truth(self) -> torch.Tensor:
        """float64 [sample, N], not by a body of the package."""
        gamma = None if self.gamma is None else self.gamma.double()
        normed = F.rms_norm(self.x[self.sample].double(), (self.problem.k,), gamma, EPS)
        y = torch.cat([F.linear(normed, part.double()) for part in self.weights[0].split(8192)], dim=-1)
        if not self.problem.swiglu:
            return y
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up

    def error(self, call: Call, truth: torch.Tensor) -> float:
        """Root mean square of the error over that of the truth; NaN where the result has one.

        The memory of the result was full of NaN before, as far as the allocator gives the same block again: an
        element that nobody writes shows.
        """
        torch.full((self.problem.m, self.problem.n), torch.nan, dtype=self.x.dtype, device=self.x.device)
        y = call(self.weights[0])[self.sample].double()
        return ((y - truth).square().mean() / truth.square().mean()).sqrt().item()

    def eager(self) -> Variant:
        """Plain PyTorch, every operator rounding."""

        def call(weight: torch.Tensor) -> torch.Tensor:
            return reference.rms_norm_linear(self.x, weight, self.gamma, EPS, activation=self.activation)

        return Variant("eager", call)

    def fused(self, config: FusionConfig) -> Variant:
        """The operator with an explicit configuration."""

        def call(weight: torch.Tensor) -> torch.Tensor:
            return rms_norm_linear(self.x, weight, self.gamma, EPS, activation=self.activation, config=config)

        return Variant(str(config), call)


def rotate_bytes(device: torch.device) -> int:
    """Three times the L2 cache: a weight that comes round again has been evicted."""
    return 3 * torch.cuda.get_device_properties(device).L2_cache_size


@functools.cache
def _shared_pool(device: int) -> tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]:
    """A stream to capture on, and a graph whose memory all others share: a pool of their own costs each a cudaMalloc.

    Never replayed; it keeps the pool alive between two captures.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=stream.device)
        graph.capture_end()
    return graph, stream


def capture(call: Call, weights: Sequence[torch.Tensor], calls: int) -> torch.cuda.CUDAGraph:
    """One graph of `calls` calls, the weights in turn.

    `torch.cuda.graph` would empty the allocator's cache before each capture, which takes longer than the capture.
    """
    first, stream = _shared_pool(torch.cuda.current_device())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call(weights[0])  # compiles, and allocates what a library keeps for this stream
        torch.cuda.synchronize()
        graph.capture_begin(pool=first.pool(), capture_error_mode="thread_local")
        try:
            for i in range(calls):
                call(weights[i % len(weights)])
        finally:
            graph.capture_end()
    return graph


def graph_timer(variant: Variant, weights: Sequence[torch.Tensor], calls: int) -> Replay:
    """The timer of a GPU: CUDA events around the replay of a graph."""
    graph = capture(variant.call, weights, calls)

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # not timed: it keeps the GPU busy while the host enqueues what is
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / calls

    return replay


def calls_for(problem: Problem, copies: int, replay_us: float) -> int:
    """Calls a replay: whole rotations, and about `replay_us` long if a GPU moves 3 TB/s and computes 400 TFLOP/s."""
    flops = 2 * problem.m * problem.weight_rows * problem.k
    estimate = max(2.0, problem.bytes_moved() / 3e6, flops / 4e8)
    return copies * max(1, round(replay_us / (copies * estimate)))


def measure(
    case: Case,
    operands: Operands,
    configs: Iterable[FusionConfig],
    timer: Timer,
    *,
    baselines: Iterable[Variant] = (),
    rounds: int = 15,
    finalists: int = 3,
) -> Result:
    """Gate and time `configs`; then the fastest few of either launch, norm + linear, and `baselines` again, in turn.

    Raises RuntimeError if norm + linear themselves do not pass the gate.
    """
    result, problem, weights = Result(case), case.problem, operands.weights
    unfused = operands.fused(UNFUSED)
    truth = operands.truth()
    allowed = TOLERANCE * operands.error(operands.eager().call, truth)
    if not (error := operands.error(unfused.call, truth)) <= allowed:
        raise RuntimeError(f"norm and linear are wrong for {case}: relative error {error:.2e}, allowed {allowed:.2e}")
    coarse, fine = (calls_for(problem, len(weights), us) for us in (COARSE_US, FINE_US))
    first: dict[str, float] = {}
    fused: dict[str, Variant] = {}
    for config in configs:
        variant = operands.fused(config)
        try:
            error = operands.error(variant.call, truth)
        except Exception as reason:  # whatever Triton, ptxas or the driver raise: it becomes the refusal
            result.refused[variant.name] = (str(reason).splitlines() or [type(reason).__name__])[0]
            continue
        if not error <= allowed:
            result.refused[variant.name] = f"relative error {error:.2e}, allowed {allowed:.2e}"
            continue
        replay = timer(variant, weights, coarse)
        first[variant.name] = min(replay() for _ in range(3))
        fused[variant.name] = variant
    ranked = sorted(first, key=lambda name: first[name])
    kept = [name for form in (False, True) for name in [n for n in ranked if is_dependent(n) == form][:finalists]]
    variants = [*(fused[name] for name in kept), unfused, *baselines]
    result.turns |= take_turns({variant.name: timer(variant, weights, fine) for variant in variants}, rounds)
    return result
