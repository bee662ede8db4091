"""The plots, from rows alone. Each function draws one figure of one device, or returns None when it has no rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.models import SHAPES
from harness.records import Record
from harness.work import Shape

from reporting.query import select
from reporting.series import OURS, Line, caption, current, engine_label, lines
from reporting.style import COPPER, INK, OTHER_PEER, PEERS, RED, ROLE_COLORS, SOFT, TEAL, axes_style, figure, finish

# (read bandwidth in B/s, dense bf16 FLOP/s) of the data sheets. What the CSV has measured wins.
PEAKS = {"NVIDIA H100 80GB HBM3": (3.35e12, 989.4e12), "NVIDIA H200": (4.8e12, 989.4e12)}


def _color(engine: str, label: str) -> str:
    """One colour an engine in all panels and plots; ours by what is fused."""
    if engine != OURS:
        return PEERS.get(engine, OTHER_PEER)
    return RED if "unfused" in label else COPPER if "forced" in label else TEAL


def _draw(ax: Any, drawn: Sequence[Line]) -> None:
    both = any("unfused" in line.label for line in drawn)
    for line in drawn:
        name, at, commit = line.label.partition(" (") if line.ours else (line.label, "", "")
        label = f"{name}, fused{at}{commit}" if both and line.ours and "," not in name else line.label
        color, dash = _color(line.engine, line.label), "-" if line.ours else (0, (4, 2))
        xs, ys = [p[0] for p in line.points], [p[1] for p in line.points]
        ax.plot(xs, ys, color=color, linestyle=dash, marker="o", markersize=4.5 if line.ours else 3.5,
                linewidth=2.1 if line.ours else 1.4, label=label, 
                zorder=2 + line.ours - 0.5 * ("unfused" in label))  # fmt: skip


def _log2(ax: Any, values: Sequence[float]) -> None:
    if not values:
        return
    ax.set_xscale("log", base=2)
    powers = [2.0**i for i in range(20) if min(values) <= 2.0**i <= max(values) * 1.05]
    ax.set_xticks(powers, [f"{v:,.0f}" for v in powers])
    ax.minorticks_off()


def _floor(ax: Any, model: str, records: Sequence[Record], one: bool) -> None:
    """A dotted line: the time in which the device reads a bf16 model once, where bandwidth was measured.

    Of `one` model the legend says how long; of several each panel does, since they share a legend.
    """
    measured = select(records, test="roof", metric="read_bytes_per_s")
    if model in SHAPES and measured:
        ms = Shape(SHAPES[model]).decode(0, 0, 2).bytes / max(r.value for r in measured) * 1e3
        label = f"weights read once, {ms:.2f} ms" if one else "weights read once"
        ax.axhline(ms, color=SOFT, linestyle=":", linewidth=1.3, label=label)
        if not one:
            ax.annotate(f"{ms:.2f}", (0.01, ms), (0, -3), xycoords=("axes fraction", "data"),
                        textcoords="offset points", va="top", fontsize=8.5, color=SOFT)  # fmt: skip


def decode(records: Sequence[Record]) -> Any:
    """Milliseconds per token and output tokens per second against batch: a column a model, or side by side for one."""
    from matplotlib.ticker import LogLocator, NullLocator

    found = current(select(records, test="decode", prompt="128"))
    rows = [r for r in found if r.metric in ("ms_per_token", "output_tok_s")]
    models = sorted({r.model for r in rows if r.engine == OURS})
    if not models:
        return None
    one = len(models) == 1
    fig, axes = figure(1, 2, height=4.4, width=10.2) if one else figure(2, len(models), height=6.4)
    panels = axes.T if one else axes  # [metric, model]
    for column, model in enumerate(models):
        for ax, metric in zip(panels[:, column], ("ms_per_token", "output_tok_s"), strict=True):
            drawn = lines([r for r in rows if r.model == model and r.metric == metric], "batch")
            _draw(ax, drawn)
            _log2(ax, [x for line in drawn for x, _ in line.points])
            axes_style(ax, "batch size" if one or metric == "output_tok_s" else "", "")
            if metric == "output_tok_s":
                ax.set_yscale("log")
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
                ax.yaxis.set_minor_locator(NullLocator())
            else:
                _floor(ax, model, records, one)
                ax.set_ylim(bottom=0, top=ax.get_ylim()[1] * 1.04)
        panels[0, column].set_title(model, loc="left" if one else "center")
    panels[0, 0].set_ylabel("time per token (ms)")
    panels[1, 0].set_ylabel("output tokens per second")
    return finish(fig, axes, "Decode against batch size, prompt of 128 tokens, host time included", caption(rows))


def decode_length(records: Sequence[Record]) -> Any:
    """Milliseconds per token of one sequence against the length of its prompt, one panel a model."""
    rows = current(select(records, test="decode", metric="ms_per_token", batch="1"))
    models = sorted({r.model for r in rows if r.engine == OURS and r.prompt != "128"})
    rows = [r for r in rows if r.model in models and r.engine == OURS]
    if not models:
        return None
    fig, axes = figure(1, len(models), height=3.9, width=10.2 if len(models) == 1 else None)
    for ax, model in zip(axes[0], models, strict=True):
        drawn = [line for line in lines([r for r in rows if r.model == model], "prompt") if len(line.points) > 1]
        _draw(ax, drawn)
        _floor(ax, model, records, len(models) == 1)
        _log2(ax, [x for line in drawn for x, _ in line.points])
        ax.set_ylim(bottom=0, top=ax.get_ylim()[1] * 1.04)
        ax.set_title(model, loc="left")
        axes_style(ax, "prompt length (tokens); 256 more are decoded", "")
    axes[0, 0].set_ylabel("time per token (ms)")
    return finish(fig, axes, "Decode of one sequence against context, host time included", caption(rows))


def prefill(records: Sequence[Record]) -> Any:
    """Time to the first token against the length of the prompt, one panel a model."""
    rows = current(select(records, test="prefill", metric="ttft_ms", batch="1"))
    models = sorted({r.model for r in rows if r.engine == OURS})
    if not models:
        return None
    fig, axes = figure(1, len(models), height=3.9, width=10.2 if len(models) == 1 else None)
    for ax, model in zip(axes[0], models, strict=True):
        drawn = lines([r for r in rows if r.model == model], "prompt")
        _draw(ax, drawn)
        _log2(ax, [x for line in drawn for x, _ in line.points])
        ax.set_ylim(bottom=0, top=ax.get_ylim()[1] * 1.04)
        ax.set_title(model, loc="left")
        axes_style(ax, "prompt length (tokens)", "")
    axes[0, 0].set_ylabel("time to first token (ms)")
    return finish(fig, axes, "Time to first token of one prompt on an idle engine", caption(rows))


def workload(records: Sequence[Record]) -> Any:
    """Output tokens per second of nano-vLLM's bench.py, one bar an engine, cold and warm."""
    rows = current(select(records, test="workload", metric="output_tok_s_*"))
    if not rows:
        return None
    names = sorted({(r.engine != OURS, r.engine, engine_label(r), r.model) for r in rows})
    fig, axes = figure(1, 1, height=1.5 + 0.62 * len(names))
    ax = axes[0, 0]
    for i, (_, engine, label, model) in enumerate(names):
        for offset, metric, alpha in ((0.19, "output_tok_s_warm", 1.0), (-0.19, "output_tok_s_cold", 0.5)):
            found = [r.value for r in rows if (engine_label(r), r.model, r.metric) == (label, model, metric)]
            if found:
                ax.barh(-i + offset, found[-1], height=0.34, color=_color(engine, label), alpha=alpha)
                when = metric.removeprefix("output_tok_s_")
                ax.text(found[-1], -i + offset, f"  {found[-1]:,.0f} {when}", va="center", fontsize=8.5, color=INK)
    ax.set_yticks([-i for i in range(len(names))], [f"{label}\n{model}" for _, _, label, model in names])
    ax.set_xlim(0, max(r.value for r in rows) * 1.18)
    axes_style(ax, "output tokens per second", "", grid="x")
    ax.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    return finish(
        fig, axes, "nano-vLLM's bench.py: 256 requests of 100 to 1,024 tokens in and out", caption(rows), False
    )


def heat_map(records: Sequence[Record]) -> Any:
    """Speed-up of the fused operator over a compiled norm and cuBLAS: a row a linear of a model, a column a batch."""
    return _operator_heat(records, "fused", "RMSNorm+Linear: speed-up over norm, then cuBLAS")


def dependent_heat_map(records: Sequence[Record]) -> Any:
    """The same, launched as programmatic dependents."""
    return _operator_heat(records, "dependent", "RMSNorm+Linear as a dependent launch: speed-up over norm, then cuBLAS")


def _operator_heat(records: Sequence[Record], form: str, title: str) -> Any:
    rows = current(select(records, test="fusion_operator", metric="speedup", options=f"* {form}"))
    value = {(f"{r.model}  {r.options.removesuffix(f' {form}')}", int(r.batch)): r.value for r in rows}
    return _heat(value, sorted({name for name, _ in value}), title, rows)


def decode_heat_map(records: Sequence[Record]) -> Any:
    """Speed-up of a whole fused decode step over the unfused one: a row a prompt length, a column a batch."""
    rows = current(select(records, test="decode", metric="ms_per_token", engine=OURS))
    rows = [r for r in rows if r.options in ("", "fusion=off") and r.prompt.isdigit() and r.batch.isdigit()]
    ms = {(r.model, int(r.prompt), int(r.batch), r.options): r.value for r in rows}
    pairs = [key[:3] for key in sorted(ms) if not key[3] and (*key[:3], "fusion=off") in ms]
    if len({prompt for _, prompt, _ in pairs}) < 2:
        return None  # one row of cells says nothing that the lines do not say

    def name(model: str, prompt: int) -> str:
        return f"{model}  {prompt:,} tokens"

    value = {(name(m, p), b): ms[m, p, b, "fusion=off"] / ms[m, p, b, ""] for m, p, b in pairs}
    return _heat(
        value, list(dict.fromkeys(name(m, p) for m, p, _ in pairs)), "Decode step: unfused time over fused", rows
    )


def _heat(value: Mapping[tuple[str, int], float], names: Sequence[str], title: str, rows: Sequence[Record]) -> Any:
    """Cells (name, batch) coloured around 1; None without cells."""
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    if not value:
        return None
    batches = sorted({batch for _, batch in value})
    fig, axes = figure(1, 1, height=1.9 + 0.33 * len(names), width=max(7.0, 3.2 + 0.75 * len(batches)))
    ax = axes[0, 0]
    grid = [[value.get((name, b), float("nan")) for b in batches] for name in names]
    colors = LinearSegmentedColormap.from_list("speed-up", ["#b8455a", "#f6f5f2", "#2c8a7d"])
    top = max(1.3, *value.values())
    norm = TwoSlopeNorm(1.0, vmin=min(0.9, *value.values()), vmax=top)
    ax.pcolormesh(grid, cmap=colors, norm=norm, edgecolors="white", linewidth=2)
    for y, line in enumerate(grid):
        for x, v in enumerate(line):
            if v == v:
                ax.text(x + 0.5, y + 0.5, f"{v:.2f}", ha="center", va="center", fontsize=9,
                        color="white" if v > 1 + 0.62 * (top - 1) else INK)  # fmt: skip
    ax.set_xticks([i + 0.5 for i in range(len(batches))], [str(b) for b in batches])
    ax.set_yticks([i + 0.5 for i in range(len(names))], list(names))
    ax.invert_yaxis()
    axes_style(ax, "rows (batch size); colours are steeper below 1 than above", "", grid="")
    ax.tick_params(length=0)
    return finish(fig, axes, title, caption(rows), False)


def roofline(records: Sequence[Record]) -> Any:
    """Achieved FLOP/s of the operator against its arithmetic intensity, under the roofs of memory and tensor cores."""
    from reporting.roofline import points, roofs

    rows = current(select(records, test="fusion_operator", metric="us", dtype="bfloat16"))
    device = rows[0].device if rows else ""
    found = {form: points(rows, form) for form in ("fused", "unfused", "gemm")}
    if not found["fused"] or device not in PEAKS:
        return None
    (bandwidth, of_memory), (flops, of_cores) = roofs(records, PEAKS[device])
    fig, axes = figure(1, 1, height=4.6, width=7.6)
    ax = axes[0, 0]
    xs = [p[0] for form in found.values() for p in form]
    low, high = min(xs) / 1.6, max(max(xs) * 1.6, flops / bandwidth * 1.5)
    knee = flops / bandwidth
    ax.plot([low, knee, high], [low * bandwidth, flops, flops], color=INK, linewidth=1.3, zorder=2)
    style = {  # drawn beside each other: one case has the same intensity in all forms
        "unfused": (RED, "norm, then linear", "o", 1 / 1.09),
        "gemm": (SOFT, "linear alone (cuBLAS)", "s", 1.0),
        "fused": (TEAL, "fused", "o", 1.09),
    }
    for form, (color, label, marker, beside) in style.items():
        if found[form]:
            ax.scatter([x * beside for x, _ in found[form]], [y for _, y in found[form]], s=11, color=color, alpha=0.75,
                       label=label, marker=marker, linewidths=0, zorder=3)  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(low, high)
    ax.text(
        knee / 9,
        knee / 5 * bandwidth,
        f"{bandwidth / 1e12:.2f} TB/s ({of_memory})",
        ha="right",
        fontsize=8.5,
        color=SOFT,
    )
    ax.text(high / 1.08, flops * 1.12, f"{flops / 1e12:.0f} TFLOP/s ({of_cores})", ha="right", fontsize=8.5, color=SOFT)
    ax.set_ylim(low * bandwidth / 6, flops * 2.2)
    axes_style(ax, "arithmetic intensity (FLOP per byte); forms are moved apart by 9 %", "achieved FLOP/s")
    return finish(fig, axes, "RMSNorm+Linear under the roofline", caption(rows))


def time_bars(records: Sequence[Record]) -> Any:
    """Where a step's time goes: one stacked bar a case and fusion, exposed time by role, then the gaps."""
    rows = [r for r in select(records, test="profile") if "role=" in r.options]
    if not rows:
        return None
    bars: dict[tuple[str, str, str], dict[str, float]] = {}
    for r in rows:
        words = dict(word.split("=") for word in r.options.split())
        bar = bars.setdefault((words["case"], r.model, words["fusion"]), {})
        role = (
            words["role"].replace("_", " ")
            if words["role"] != "o_proj" and words["role"] != "gate_up"
            else words["role"]
        )
        key = role if r.metric == "exposed_us" else "idle"
        bar[key] = bar.get(key, 0.0) + r.value
    order = {"off": 0, "auto": 1, "on": 2}
    groups = sorted({key[:2] for key in bars})
    fig, axes = figure(len(groups), 1, height=1.3 + 1.15 * len(groups), width=9.6)
    for ax, group in zip(axes[:, 0], groups, strict=True):
        members = sorted((key for key in bars if key[:2] == group), key=lambda key: order[key[2]])
        longest = max(sum(bars[key].values()) for key in members)
        for i, key in enumerate(members):
            left = 0.0
            for role, color in ROLE_COLORS.items():
                width = bars[key].get(role, 0.0)
                if width:
                    ax.barh(-i, width, left=left, height=0.66, color=color, edgecolor="white", linewidth=0.6)
                    if width > longest * 0.055 and role != "idle":
                        ax.text(left + width / 2, -i, role, ha="center", va="center", fontsize=7.5, color="white")
                    left += width
            ax.text(left, -i, f"  {left:,.0f}", va="center", fontsize=9, color=INK)
        names = {"off": "unfused", "auto": "fused", "on": "fused (forced)"}
        ax.set_yticks([-i for i in range(len(members))], [names[key[2]] for key in members])
        ax.set_xlim(0, longest * 1.08)
        ax.set_title(f"{group[0]}, {group[1]}", loc="left")
        axes_style(ax, "", "", grid="x")
        ax.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    axes[-1, 0].set_xlabel("µs of a step: exposed kernel time by role; pale: the GPU is idle")
    return finish(fig, axes, "Where a step's time goes", caption(rows), False)


FIGURES: dict[str, Callable[[Sequence[Record]], Any]] = {
    "decode": decode,
    "decode_length": decode_length,
    "decode_speedup": decode_heat_map,
    "prefill": prefill,
    "workload": workload,
    "fusion_speedup": heat_map,
    "fusion_dependent": dependent_heat_map,
    "roofline": roofline,
    "time": time_bars,
}
