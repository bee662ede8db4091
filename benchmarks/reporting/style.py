"""How the plots look: one palette (that of the timeline), few lines, labelled axes, provenance below."""

from __future__ import annotations

import textwrap
from typing import Any

INK, SOFT, RULE = "#1d2126", "#6a7078", "#e3e4e3"
TEAL, RED, COPPER = "#2c8a7d", "#c2485b", "#d9793d"
PEERS = {"vllm": "#3a6ea8", "nano-vllm": "#c3a04d"}  # any other engine is violet
OTHER_PEER = "#a195cc"

# In the order of a forward pass; the colours of `nanovllm.profiling.timeline`.
ROLE_COLORS = {
    "prepare": "#9aa1a9", "norm": "#c2485b", "qkv": "#3a6ea8", "rope": "#d99a2b", "attention": "#d9703a",
    "o_proj": "#6a9fd0", "gate_up": "#2c8a7d", "activation": "#d98a9b", "down": "#63b3a2", "layer": "#54789c",
    "final norm": "#a33d6d", "head": "#6a5aa8", "sample": "#a195cc", "copy": "#c3c7cb", "idle": "#ecebe8",
}  # fmt: skip


def figure(rows: int, columns: int, height: float, width: float | None = None) -> tuple[Any, Any]:
    """A figure and its axes as a [rows, columns] array; inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK, "axes.labelcolor": INK,
            "axes.edgecolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT, "axes.titlesize": 10.5,
            "axes.titleweight": "bold", "svg.hashsalt": "nanovllm", "figure.dpi": 150,
        }
    )  # fmt: skip
    width = width if width is not None else max(7.6, 3.6 * columns)
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False)


def axes_style(ax: Any, x_label: str, y_label: str, grid: str = "both") -> None:
    """Labels, a quiet grid, no box."""
    if x_label:
        ax.set_xlabel(x_label)
    if y_label:
        ax.set_ylabel(y_label)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if grid:
        ax.grid(axis=grid, color=RULE, linewidth=0.8)
    ax.set_axisbelow(True)


def finish(fig: Any, axes: Any, title: str, caption: str, legend: bool = True) -> Any:
    """Title above, one legend for all panels, provenance below."""
    width, height = fig.get_size_inches()
    handles: dict[str, Any] = {}
    for ax in axes.flat:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    shown = legend and bool(handles)
    fig.text(0.12 / width, 1 - 0.12 / height, title, ha="left", va="top", fontsize=12.5, fontweight="bold")
    if shown:
        fig.legend(
            handles.values(),
            handles.keys(),
            loc="upper left",
            bbox_to_anchor=(0.04 / width, 1 - 0.36 / height),
            ncols=min(5, len(handles)),
            frameon=False,
            fontsize=9,
            handlelength=1.9,
            columnspacing=1.6,
        )
    note = textwrap.fill(caption, int(width * 15.5))
    fig.text(0.12 / width, 0.08 / height, note, ha="left", va="bottom", fontsize=7.5, color=SOFT)
    below, above = 0.16 + 0.14 * (note.count("\n") + 1), 0.72 if shown else 0.42
    fig.tight_layout(rect=(0.008, below / height, 0.995, 1 - above / height))
    return fig
