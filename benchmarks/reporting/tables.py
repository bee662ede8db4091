"""The rows of `metrics.csv` as Markdown: one table a question, engines side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness.records import Record

from reporting.query import select
from reporting.series import OURS, caption, current, engine_label, gpus

HEAD = """\
# Tables

Made from [metrics.csv](metrics.csv) by `make report`; edit neither. Every table names its versions and commit."""
OPERATOR = {"fused": "", "dependent": " as a dependent launch"}  # forms of its rows, and what a title says of them


def tables(records: Sequence[Record]) -> str:
    """All tables of all GPUs, as one document."""
    parts = [HEAD]
    for device in gpus(records):
        own = [r for r in records if r.device == device]
        parts.append(f"## {device}")
        parts += _section(
            "Decode: milliseconds per token", select(own, test="decode", metric="ms_per_token", prompt="128"), "batch"
        )
        parts += _section(
            "Decode: output tokens per second", select(own, test="decode", metric="output_tok_s", prompt="128"), "batch"
        )
        parts += _section("Time to first token (ms)", select(own, test="prefill", metric="ttft_ms"), "prompt")
        parts += _section(
            "nano-vLLM's bench.py: output tokens per second", select(own, test="workload", metric="*tok_s*"), "metric"
        )
        for form, title in OPERATOR.items():
            parts += _operator(title, select(own, test="fusion_operator", metric="speedup", options=f"* {form}"))
        parts += _profiles(select(own, test="profile"))
    return "\n\n".join(parts) + "\n"


def _section(title: str, rows: Sequence[Record], field: str) -> list[str]:
    """A table with a line for each model and value of `field`, and a column for each engine.

    A number of ours that is older than the newest engine's has its commit beside it.
    """
    if not rows:
        return []
    today = current(rows)
    engines = sorted({(r.engine != OURS, engine_label(r)) for r in rows})
    lines = sorted({(r.model, getattr(r, field)) for r in rows}, key=lambda key: (key[0], _natural(key[1])))
    body = []
    for model, at in lines:
        cells = []
        for _, label in engines:
            found = [r for r in rows if (r.model, getattr(r, field), engine_label(r)) == (model, at, label)]
            newest = max(found, key=lambda r: r.date, default=None)
            old = newest is not None and newest.engine == OURS and newest not in today
            cells.append((number(newest.value) if newest else "") + (f" ({newest.commit})" if newest and old else ""))
        body.append([model, at, *cells])
    head = ["model", {"prompt": "prompt tokens", "metric": "run"}.get(field, field), *(label for _, label in engines)]
    return [f"### {title}", markdown(head, body), f"{caption(rows)}."]


def _operator(title: str, rows: Sequence[Record]) -> list[str]:
    """Geometric mean, worst and best of the operator's speed-up at each batch."""
    if not rows:
        return []
    body = []
    for batch in sorted({int(r.batch) for r in rows}):
        values = [r.value for r in rows if r.batch == str(batch)]
        mean = math.exp(sum(map(math.log, values)) / len(values))
        slower = sum(v < 1 for v in values)
        body.append(
            [str(batch), str(len(values)), *(f"{v:.2f}" for v in (mean, min(values), max(values))), str(slower)]
        )
    head = ["rows", "shapes", "geometric mean", "worst", "best", "slower than unfused"]
    return [f"### RMSNorm+Linear{title}: speed-up over norm, then cuBLAS", markdown(head, body), f"{caption(rows)}."]


def _profiles(rows: Sequence[Record]) -> list[str]:
    """The profiled steps, fused and unfused."""
    steps = sorted((r for r in rows if r.metric == "step_us"), key=lambda r: (r.model, r.options))
    if not steps:
        return []

    def of(step: Record, metric: str) -> str:
        found = [r for r in rows if (r.model, r.options, r.metric) == (step.model, step.options, metric)]
        return number(found[0].value) if found else ""

    body = []
    for step in steps:
        words = dict(word.split("=") for word in step.options.split())
        facts = [of(step, metric) for metric in ("kernels", "idle_share", "gb_s")]
        body.append([step.model, words["case"], words["fusion"], number(step.value), *facts])
    head = ["model", "case", "fusion", "step (µs, median)", "kernels", "idle share", "GB/s"]
    return ["### Profiled steps", markdown(head, body), f"{caption(steps)}."]


def number(value: float) -> str:
    """About three significant digits, thousands with commas."""
    size = abs(value)
    return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def _natural(text: str) -> tuple[float, str]:
    return (float(text), "") if text.isdigit() else (math.inf, text)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; everything but the first column is right-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))
