"""What fusion would do, or does, to a model: patterns, shapes, bytes saved in theory, reasons."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from nanovllm.fusion.detect import Group, detect
from nanovllm.kernels.rms_norm_linear_fusion import why_not


@dataclass(frozen=True, slots=True)
class Pattern:
    """Groups that differ in their layer only."""

    norm: str
    linears: tuple[str, ...]
    count: int
    n: int  # weight rows of all linears together
    k: int
    bias: bool
    activation: str | None  # part of the fused operator
    dtype: str
    fused: bool
    bytes_saved: int  # by all of them, for one row
    reasons: tuple[str, ...]  # why they are left alone
    gate_reasons: tuple[str, ...]  # why their SwiGLU stays outside
    fallback: tuple[str, ...]  # why one row would not run a fused kernel on the model's device


@dataclass(frozen=True, slots=True)
class Report:
    """The patterns of a model; `str` makes a table of them."""

    patterns: tuple[Pattern, ...]

    @property
    def bytes_saved(self) -> int:
        """For one row, by all groups that are fused or can be."""
        return sum(pattern.bytes_saved for pattern in self.patterns if not pattern.reasons)

    def __str__(self) -> str:
        possible = sum(p.count for p in self.patterns if not p.reasons)
        total = sum(p.count for p in self.patterns)
        lines = [
            f"RMSNorm→Linear groups: {total}, of which {possible} can be fused and "
            f"{sum(p.count for p in self.patterns if p.fused)} are",
            f"  {'count':>5}  {'weight [N, K]':<18}{'KB saved':>9}  group",
        ]
        for p in self.patterns:
            short = ", ".join(name.rpartition(".")[2] for name in p.linears)
            state = "fused" if p.fused else "left alone" if p.reasons else "can be fused"
            extra = (" + bias" if p.bias else "") + (f" → {p.activation}" if p.activation else "")
            numbers = f"  {p.count:>5}  {f'[{p.n}, {p.k}]':<18}{p.bytes_saved / 1e3:>9.1f}"
            lines.append(f"{numbers}  {p.norm} → {short}{extra}: {state}")
            lines += [f"{'':>36}{reason}" for reason in p.reasons]
            lines += [f"{'':>36}SwiGLU stays outside: {reason}" for reason in p.gate_reasons if not p.reasons]
            lines += [f"{'':>36}falls back at one row: {reason}" for reason in p.fallback]
        lines.append(f"bytes saved in theory: {self.bytes_saved:,} a row (a token)")
        return "\n".join(lines)


def report(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Patterns of a model, fused or not. Arguments and errors as in `detect`."""
    alike: dict[Any, list[Group]] = {}
    for group in detect(model, *args, **kwargs):
        reasons, gate_reasons = _of_any_layer(group.reasons), _of_any_layer(group.gate_reasons)
        key = (
            group.pattern, group.n, group.k, group.bias, group.activation, group.dtype, group.fused,
            reasons, gate_reasons,
        )  # fmt: skip
        alike.setdefault(key, []).append(group)
    return Report(tuple(_pattern(model, groups, *key[-2:]) for key, groups in alike.items()))


def _of_any_layer(reasons: tuple[str, ...]) -> tuple[str, ...]:
    """Sentences with `*` for numbers in names, as in `Group.pattern`."""
    return tuple(re.sub(r"\.\d+\b(?=\.)", ".*", reason) for reason in reasons)


def _pattern(model: nn.Module, groups: list[Group], reasons: tuple[str, ...], gate_reasons: tuple[str, ...]) -> Pattern:
    first = groups[0]
    norm, linears = first.pattern
    return Pattern(
        norm, linears, len(groups), first.n, first.k, first.bias, first.activation, first.dtype, first.fused,
        sum(group.bytes_saved() for group in groups), reasons, gate_reasons,
        () if reasons else _fallback(model, first),
    )  # fmt: skip


def _fallback(model: nn.Module, group: Group) -> tuple[str, ...]:
    """`why_not` of one row; the weight is a stand-in without memory of its own."""
    weight = model.get_submodule(group.linears[0]).get_parameter("weight").detach()
    x = weight.new_empty(1, group.k)
    eps = group.form.eps if group.form else 0.0
    return tuple(why_not(x, weight[:1].expand(group.n, group.k), None, eps, activation=group.activation))
