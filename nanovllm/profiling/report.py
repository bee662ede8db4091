"""A profile as text: `summary.csv` for machines, `notes.md` for people, both with where the numbers come from."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from nanovllm.profiling.attribute import ROLES
from nanovllm.profiling.distil import Profile, Row
from nanovllm.profiling.facts import CASES
from nanovllm.profiling.nsys import Measured

COLUMNS = (
    "case", "fusion", "level", "name", "role", "calls_per_step", "total_us", "mean_us", "min_us", "exposed_us",
    "gap_us", "share", "gb_s", "model", "device", "dtype", "profiler", "torch", "triton", "version",
)  # fmt: skip
LABELS = {"off": "unfused", "auto": "fused", "on": "fused (forced)"}


def summary_csv(profiles: Sequence[Profile]) -> str:
    """One row for the step, for every role and for every kernel of each profile; times are µs per step."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for p in profiles:
        f = p.facts
        shared = {
            "case": f.case, "fusion": f.fusion, "model": f.model, "device": f.device, "dtype": f.dtype,
            "profiler": p.source, "torch": f.torch, "triton": f.triton, "version": f.version,
        }  # fmt: skip
        for level, row in [("step", step_row(p))] + [("role", r) for r in p.roles] + [("kernel", r) for r in p.kernels]:
            writer.writerow({**shared, "level": level, **_numbers(row)})
    return out.getvalue()


def step_row(profile: Profile) -> Row:
    """The whole step as a row: exposed time and gaps are its mean period, idle time included."""
    rows = profile.roles
    total = sum(r.total_us for r in rows)
    periods = [s.period / 1e3 for s in profile.steps]
    return Row(
        "step", "", profile.kernels_per_step, total, profile.mean_period_us, min(periods),
        sum(r.exposed_us for r in rows), sum(r.gap_us for r in rows), 1.0, profile.gb_s,
    )  # fmt: skip


def _numbers(row: Row) -> dict[str, str]:
    plain = {"name": row.name, "role": row.role, "gb_s": "" if row.gb_s is None else f"{row.gb_s:.4g}"}
    values = {
        "calls_per_step": row.calls, "total_us": row.total_us, "mean_us": row.mean_us, "min_us": row.min_us,
        "exposed_us": row.exposed_us, "gap_us": row.gap_us, "share": row.share,
    }  # fmt: skip
    return plain | {name: f"{value:.5g}" for name, value in values.items()}


def notes(profiles: Sequence[Profile], counters: str = "") -> str:
    """Markdown: the step side by side, roles side by side, the kernels of each, and how to read it."""
    first = profiles[0]
    f = first.facts
    parts = [
        f"# {CASES[f.case].title}: {f.model}",
        f"{f.device}, {f.dtype}, torch {f.torch}, Triton {f.triton or 'not installed'}, nanovllm {f.version}; "
        f"recorded with {first.source}; copy bandwidth measured in the same process {f.copy_gb_s:,.0f} GB/s.",
    ]
    parts += [f"**{note}.**" for note in sorted({p.facts.note for p in profiles if p.facts.note})]
    parts += [_step_table(profiles), "## Where a step goes (µs: exposed and gap)", _role_table(profiles)]
    for p in profiles:
        parts += [f"## Kernels, {LABELS[p.facts.fusion]}", _kernel_table(p)]
        if not p.layers_found:
            parts.append("No repetition of layers was found in these kernels: roles are guesses from their names.")
    if counters:
        parts += ["## DRAM traffic by ncu's counters", counters]
    parts += ["## How to read it", _READING]
    return "\n\n".join(parts) + "\n"


_READING = """\
A kernel is *exposed* from the latest end before it (or its own start, if later) to its own end; the *gap* before it is
time in which the GPU ran nothing. Both add up to the step, also where kernels overlap; the durations in the kernel
tables do not. Bandwidth is the bytes that a role must move (weights once, activations, KV) over exposed time and gap;
a role whose weights are loaded while its predecessor still runs can show more than the memory delivers, a whole step
cannot. Recording itself slows the host: compare shares and kernels here, and take latencies from `metrics.csv`."""


def _step_table(profiles: Sequence[Profile]) -> str:
    def bandwidth(p: Profile) -> str:
        return "not known" if p.gb_s is None else f"{p.gb_s:,.0f} GB/s ({p.gb_s / p.facts.copy_gb_s:.0%} of copy)"

    rows = [
        ("step, median (µs)", [f"{p.period_us:,.1f}" for p in profiles]),
        ("kernels a step", [f"{p.kernels_per_step:.0f}" for p in profiles]),
        ("GPU idle", [f"{p.idle_share:.1%}" for p in profiles]),
        ("achieved bandwidth", [bandwidth(p) for p in profiles]),
        ("host clock per step (ms)", [f"{p.facts.wall_ms_per_step:.3f}" for p in profiles]),
        ("steps recorded", [f"{len(p.steps)}" for p in profiles]),
    ]
    return _table(["", *(LABELS[p.facts.fusion] for p in profiles)], [[name, *values] for name, values in rows])


def _role_table(profiles: Sequence[Profile]) -> str:
    by_role = [{row.name: row for row in p.roles} for p in profiles]
    header = ["role"]
    for p in profiles:
        label = LABELS[p.facts.fusion]
        header += [f"{label}: kernels", "exposed", "gap", "GB/s"]
    rows = []
    for role in ROLES:
        if any(role in rows_of for rows_of in by_role):
            line = [role]
            for rows_of in by_role:
                row = rows_of.get(role)
                line += ["", "", "", ""] if row is None else [
                    f"{row.calls:.4g}", f"{row.exposed_us:,.1f}", f"{row.gap_us:,.1f}",
                    "" if row.gb_s is None else f"{row.gb_s:,.0f}",
                ]  # fmt: skip
            rows.append(line)
    return _table(header, rows)


def _kernel_table(profile: Profile, most: int = 24) -> str:
    rows = [
        [f"`{r.name[:70]}`", r.role, f"{r.calls:.4g}", f"{r.total_us:,.1f}", f"{r.mean_us:.2f}", f"{r.min_us:.2f}",
         f"{r.share:.1%}"]
        for r in profile.kernels[:most]
    ]  # fmt: skip
    rest = profile.kernels[most:]
    if rest:
        rows.append([f"{len(rest)} more", "", f"{sum(r.calls for r in rest):.4g}",
                     f"{sum(r.total_us for r in rest):,.1f}", "", "", f"{sum(r.share for r in rest):.1%}"])  # fmt: skip
    return _table(["kernel", "role", "a step", "µs a step", "mean µs", "min µs", "share of step"], rows)


def ncu_table(measured: Sequence[Measured], most: int = 20) -> str:
    """Counted traffic per kernel, as Markdown."""
    rows = [
        [f"`{m.kernel[:70]}`", str(m.launches), f"{m.us:.2f}", f"{m.bytes_read / 1e6:.2f}",
         f"{m.bytes_written / 1e6:.2f}", f"{m.gb_s:,.0f}"]
        for m in measured[:most]
    ]  # fmt: skip
    return _table(["kernel", "launches", "mean µs", "MB read", "MB written", "GB/s"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
