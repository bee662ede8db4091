"""What RMSNorm+Linear is compared with on a GPU, and what is reported of the comparison.

Measured by `nanovllm.tuning`: the same operands, gate and clock that `nanovllm tune` uses, with these baselines beside
the candidates: the GEMM alone (a bound, not a rival), plain PyTorch, and a compiled norm in front of cuBLAS.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from harness.records import Record
from nanovllm import __version__
from nanovllm.tuning.cases import Case
from nanovllm.tuning.measure import EPS, Operands, Result, Variant
from nanovllm.tuning.search import Extra

FORMS = ("fused", "dependent", "compiled", "unfused", "eager", "gemm")
NOISE = 0.02  # a speed-up above 1 - NOISE is no loss
LARGE_BYTES = 12e6  # weights for which the share of bandwidth is a goal


def baselines(operands: Operands) -> list[Variant]:
    """SwiGLU costs the unfused forms a kernel of its own. Where gamma is folded, the rivals have none either."""
    x, gamma, swiglu = operands.x, operands.gamma, operands.problem.swiglu
    norm = _compiled(_norm)
    act: Callable[[torch.Tensor], torch.Tensor] = _compiled(_swiglu) if swiglu else (lambda y: y)
    normed = _norm(x, gamma)
    return [
        Variant("gemm", lambda w: F.linear(normed, w)),
        Variant("compiled", lambda w: act(F.linear(norm(x, gamma), w))),
        operands.eager(),
    ]


def warm(case: Case) -> None:
    """Compile the baselines into Inductor's cache."""
    operands = Operands(case.problem, torch.device("cuda"), folded=case.folded)
    for variant in baselines(operands):
        variant.call(operands.weights[0])
    torch.cuda.synchronize()


BASELINES = Extra(baselines, warm)


def _norm(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    wide = x.float()
    y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    return y if weight is None else y * weight


def _swiglu(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Compiled for exactly the shapes it meets: the baseline at its best."""
    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(function, dynamic=False)


@dataclass(frozen=True)
class Report:
    """Results of one run, against the read bandwidth (bytes a second) of the same run."""

    wanted: list[Case]
    results: list[Result]
    bandwidth: float

    @property
    def test(self) -> str:
        """What the rows are called: with gamma folded another measurement, not one beside the others."""
        folded = any(case.folded for case in self.wanted)
        return "fusion_operator_folded" if folded else "fusion_operator"

    @property
    def launches(self) -> list[str]:
        """Forms of our own that were measured."""
        return ["fused", "dependent"] if any(result.has_dependents for result in self.results) else ["fused"]

    @staticmethod
    def speedup(result: Result, form: str) -> float:
        """Over compiled norm and cuBLAS."""
        return result.speedup(form, "compiled")

    def share(self, result: Result, form: str) -> float:
        """Of the read bandwidth, that the chosen configuration reaches with the bytes of the fused operator."""
        return result.case.problem.bytes_moved() / (result.us(form) * 1e-6) / self.bandwidth

    def line(self, result: Result) -> str:
        """One case in one line of text."""
        case = result.case
        times = "  ".join(f"{form} {result.us(form):.2f}" for form in FORMS if form != "dependent")
        ours = (
            f"{form} x{self.speedup(result, form):.3f} {result.choice(dependent=form == 'dependent')} "
            f"({self.share(result, form):.0%} of bandwidth)"
            for form in self.launches
        )
        reasons = [f"{name}: {reason[:60]}" for name, reason in sorted(result.refused.items())]
        refused = f"  REFUSED {len(reasons)} ({reasons[0]})" if reasons else ""
        return f"{case.model:12} {case.layer:14} M {case.problem.m:4}  {times} us  {', '.join(ours)}{refused}"

    def groups(self) -> Iterator[tuple[str, list[Result], bool]]:
        """Results whose geometric mean is worth knowing, under a name, and whether none of the group is missing."""
        few = [case for case in self.wanted if case.problem.m <= 64]
        many = [case for case in self.wanted if case.problem.m > 64]
        groups = {"all to M=64": few, "all above M=64": many}
        groups |= {f"M={m}": [c for c in self.wanted if c.problem.m == m] for m in (c.problem.m for c in self.wanted)}
        groups |= {f"{name} to M=64": [c for c in few if c.layer == name] for name in (c.layer for c in few)}
        groups |= {f"{name} above M=64": [c for c in many if c.layer == name] for name in (c.layer for c in many)}
        for name, cases in groups.items():
            if found := [result for result in self.results if result.case in cases]:
                yield name, found, len(found) == len(cases)

    def summary(self) -> str:
        """Of each form: geometric means, wins and losses, the worst case, the share of bandwidth of one row."""
        return "\n".join(self._summary(form) for form in self.launches) if self.results else "no case was measured"

    def _summary(self, form: str) -> str:
        def speedup(result: Result) -> float:
            return self.speedup(result, form)

        text = [f"{form}: speed-up over compiled norm + cuBLAS: geometric mean (worst; best)"]
        for name, group, complete in self.groups():
            values = [speedup(r) for r in group]
            mean = statistics.geometric_mean(values)
            part = "" if complete else " (INCOMPLETE)"
            text.append(f"  {name:24} {mean:.3f} ({min(values):.3f}; {max(values):.3f}), {len(group)} cases{part}")
        losses = [r for r in self.results if speedup(r) < 1 - NOISE]
        wins = [r for r in self.results if speedup(r) > 1 + NOISE]
        unfused = [r for r in self.results if r.choice(dependent=form == "dependent") == "unfused"]
        text.append(f"{len(wins)} wins, {len(losses)} losses beyond {NOISE:.0%}, {len(unfused)} stay unfused")
        text += [f"  LOSS {self.line(r)}" for r in losses]
        text.append(f"worst: {self.line(min(self.results, key=speedup))}")
        large = [r for r in self.results if r.case.problem.m == 1 and _weight_bytes(r) >= LARGE_BYTES]
        if large:
            least = min(large, key=lambda r: self.share(r, form))
            text.append(
                f"M=1, weights of {LARGE_BYTES / 1e6:.0f} MB and more: at least {self.share(least, form):.1%} of the "
                f"read bandwidth of {self.bandwidth / 1e12:.3f} TB/s ({least.case.model} {least.case.layer})"
            )
        return "\n".join(text)

    def records(self, origin: dict[str, str]) -> list[Record]:
        """Rows for metrics.csv: times, speed-ups, shares of bandwidth, and the geometric means of complete `groups`."""
        shared = dict(version=__version__, weights="random", **origin)
        found = []
        for result in self.results:
            case = result.case
            about = dict(model=case.model, dtype=case.problem.dtype, batch=str(case.problem.m), **shared)
            notes = {form: result.choice(dependent=form == "dependent") for form in self.launches}
            values = [("us", form, result.us(form)) for form in FORMS if form != "dependent" or form in notes]
            values += [("speedup", form, self.speedup(result, form)) for form in notes]
            if case.problem.m == 1:
                values += [("bandwidth_share", form, self.share(result, form)) for form in notes]
            for metric, form, value in values:
                text = f"{case.layer} {form}"
                found.append(Record(self.test, metric, value, options=text, note=notes.get(form, ""), **about))
        dtype = self.results[0].case.problem.dtype if self.results else ""
        for (name, group, complete), form in itertools.product(self.groups(), self.launches):
            if complete:
                values_of = [self.speedup(r, form) for r in group]
                options = name if form == "fused" else f"{name}, {form}"
                about = dict(model="all", dtype=dtype, options=options, **shared)
                note = f"{len(group)} cases, worst {min(values_of):.3f}"
                mean = statistics.geometric_mean(values_of)
                found.append(Record(self.test, "speedup_geomean", mean, note=note, **about))
        about = dict(dtype="float32", options="1 GiB summed", **shared)
        return [*found, Record(self.test, "read_bytes_per_s", self.bandwidth, **about)]


def _weight_bytes(result: Result) -> int:
    problem = result.case.problem
    return problem.weight_rows * problem.k * problem.element_size


def distinct(cases: Iterable[Case]) -> list[Case]:
    """Cases whose problem has not come before."""
    return list({case.problem: case for case in reversed(list(cases))}.values())[::-1]
