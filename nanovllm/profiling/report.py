"""A profile as text: `summary.csv` for machines, `notes.md` for people, both with where the numbers come from."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from nanovllm.profiling.attribute import ROLES
from nanovllm.profiling.distil import Profile, Row
from nanovllm.profiling.facts import CASES, Facts
from nanovllm.profiling.ncu import Counted

COLUMNS = (
    "case", "fusion", "level", "name", "role", "calls_per_step", "total_us", "mean_us", "min_us", "exposed_us",
    "gap_us", "share", "gb_s", "ncu_us", "ncu_mb_read", "ncu_mb_written", "ncu_dram_percent", "ncu_occupancy_percent",
    "free_step_us", "free_wait_us", "free_graph_us", "model", "device", "dtype", "profiler", "torch", "triton",
    "version",
)  # fmt: skip
LABELS = {"off": "unfused", "auto": "fused", "on": "fused (forced)"}


def summary_csv(profiles: Sequence[Profile]) -> str:
    """One row for the step, for every role and for every kernel of each profile.

    Times are µs per step; ncu's columns are means of one launch; the free ones (of the step) are without recorder.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for p in profiles:
        f = p.facts
        shared = {
            "case": f.case, "fusion": f.fusion, "model": f.model, "device": f.device, "dtype": f.dtype,
            "profiler": p.source, "torch": f.torch, "triton": f.triton, "version": f.version,
        }  # fmt: skip
        counted = {(c.name, c.role): _counters(c) for c in p.counted}
        free = {f"free_{name}_us": f"{us:.5g}" for name, us in _free(f) if us}
        writer.writerow({**shared, "level": "step", **_numbers(step_row(p)), **free})
        for row in p.roles:
            writer.writerow({**shared, "level": "role", **_numbers(row)})
        for row in p.kernels:
            writer.writerow({**shared, "level": "kernel", **_numbers(row), **counted.get((row.name, row.role), {})})
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


def _free(facts: Facts) -> tuple[tuple[str, float], ...]:
    return ("step", facts.free_step_us), ("wait", facts.free_wait_us), ("graph", facts.free_graph_us)


def _counters(c: Counted) -> dict[str, str]:
    values = {
        "us": c.us, "mb_read": c.bytes_read / 1e6, "mb_written": c.bytes_written / 1e6,
        "dram_percent": c.dram_percent, "occupancy_percent": c.occupancy_percent,
    }  # fmt: skip
    return {f"ncu_{name}": f"{value:.4g}" for name, value in values.items()}


def _numbers(row: Row) -> dict[str, str]:
    plain = {"name": row.name, "role": row.role, "gb_s": "" if row.gb_s is None else f"{row.gb_s:.4g}"}
    values = {
        "calls_per_step": row.calls, "total_us": row.total_us, "mean_us": row.mean_us, "min_us": row.min_us,
        "exposed_us": row.exposed_us, "gap_us": row.gap_us, "share": row.share,
    }  # fmt: skip
    return plain | {name: f"{value:.5g}" for name, value in values.items()}


def notes(profiles: Sequence[Profile]) -> str:
    """Markdown: the step side by side, roles side by side, the kernels of each, and how to read it."""
    first = profiles[0]
    f = first.facts
    when = f", {f.date}" * bool(f.date) + f", commit {f.commit}" * bool(f.commit)
    bandwidth = f"; copy bandwidth measured in the same process {f.copy_gb_s:,.0f} GB/s" if f.copy_gb_s else ""
    parts = [
        f"# {CASES[f.case].title}: {f.model}",
        f"{f.device}, {f.dtype}, torch {f.torch}, Triton {f.triton or 'not installed'}, nanovllm {f.version}{when}; "
        f"recorded with {first.source}{bandwidth}.",
    ]
    parts += [f"{note}." for note in sorted({p.facts.note for p in profiles if p.facts.note})]
    parts += [_step_table(profiles)]
    if any(p.facts.free_step_us for p in profiles):
        parts += ["## Without a recorder", _free_table(profiles), *map(pace, profiles)]
    parts += ["## Where a step goes (µs: exposed and gap)", _role_table(profiles)]
    for p in profiles:
        parts += [f"## Kernels, {LABELS[p.facts.fusion]}", _kernel_table(p)]
        if not p.layers_found:
            parts.append("No repetition of layers was found in these kernels: roles are guesses from their names.")
    for p in profiles:
        if p.counted or p.why_not_counted:
            parts.append(f"## Hardware counters of one step, {LABELS[p.facts.fusion]}")
            parts.append(_counter_table(p.counted) if p.counted else f"None: {p.why_not_counted}.")
    if any(p.counted for p in profiles):
        parts.append(_COUNTING)
    parts += ["## How to read it", _READING]
    return "\n\n".join(parts) + "\n"


def pace(profile: Profile) -> str:
    """Who sets the pace of the steps that nothing records: one sentence."""
    f, label = profile.facts, LABELS[profile.facts.fusion].capitalize()
    if not f.free_step_us:
        return f"{label}: not timed without a recorder."
    busy, wait = f"{f.free_step_us - f.free_wait_us:,.0f} µs", f"{f.free_wait_us:,.0f} µs"
    if CASES[f.case].isolated:
        return f"{label}: the host launches for {busy}, then waits {wait} for the device to end."
    if f.free_wait_us < 0.02 * f.free_step_us:
        return f"{label}: the host sets the pace; it works {busy} a step and waits {wait}."
    hidden = f"{label}: the device sets the pace; the host works {busy} a step and waits {wait}."
    if not f.free_graph_us:
        return hidden
    rest = f.free_step_us - f.free_graph_us
    if rest < 0:
        return f"{hidden} Its graph takes {-rest:,.0f} µs more when it is replayed back to back."
    return f"{hidden} {rest:,.0f} µs a step are outside its graph: copies in and out, and the launch."


_COUNTING = """\
ncu replays each kernel by itself, behind flushed caches and at the clocks the device has: no overlap, no activations in
L2. *DRAM* is the share of the memory's peak throughput while the kernel ran, *occupancy* the share of warps resident on
SMs that did something."""

_READING = """\
A kernel is *exposed* from the latest end before it (or its own start, if later) to its own end; the *gap* before it is
time in which the GPU ran nothing. Both add up to the step, also where kernels overlap; the durations in the kernel
tables do not. Bandwidth is the bytes that a role must move (weights once, activations, KV) over exposed time and gap;
a role whose weights are loaded while its predecessor still runs can show more than the memory delivers, a whole step
cannot. Recording itself slows the host: compare shares and kernels here, and take a step's time from "Without a
recorder"."""


def _step_table(profiles: Sequence[Profile]) -> str:
    def bandwidth(p: Profile) -> str:
        if p.gb_s is None:
            return "not known"
        return f"{p.gb_s:,.0f} GB/s" + (f" ({p.gb_s / p.facts.copy_gb_s:.0%} of copy)" if p.facts.copy_gb_s else "")

    rows = [
        ("step, median (µs)", [f"{p.period_us:,.1f}" for p in profiles]),
        ("kernels a step", [f"{p.kernels_per_step:.0f}" for p in profiles]),
        ("GPU idle", [f"{p.idle_share:.1%}" for p in profiles]),
        ("achieved bandwidth", [bandwidth(p) for p in profiles]),
        ("host clock per step (µs)", [f"{p.facts.wall_ms_per_step * 1e3:,.1f}" for p in profiles]),
        ("steps recorded", [f"{len(p.steps)}" for p in profiles]),
    ]
    return _table(["", *(LABELS[p.facts.fusion] for p in profiles)], [[name, *values] for name, values in rows])


def _free_table(profiles: Sequence[Profile]) -> str:
    def us(value: float) -> str:
        return f"{value:,.1f}" if value else ""

    facts = [p.facts for p in profiles]
    rows = [
        ["step, median of the host's clock (µs)", *(us(f.free_step_us) for f in facts)],
        ["the same under the recorder", *(us(p.period_us) for p in profiles)],
        ["the step's CUDA graph, replayed back to back", *(us(f.free_graph_us) for f in facts)],
        ["host at work", *(us(f.free_step_us - f.free_wait_us) for f in facts)],
        ["host waiting for the device", *(us(f.free_wait_us) for f in facts)],
    ]
    return _table(["", *(LABELS[f.fusion] for f in facts)], rows)


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


def _counter_table(counted: Sequence[Counted]) -> str:
    rows = [
        [f"`{c.name[:70]}`", c.role, str(c.launches), f"{c.us:.2f}", f"{c.bytes_read / 1e6:.2f}",
         f"{c.bytes_written / 1e6:.2f}", f"{c.gb_s:,.0f}", f"{c.dram_percent:.0f}%", f"{c.occupancy_percent:.0f}%"]
        for c in counted
    ]  # fmt: skip
    header = ["kernel", "role", "launches", "mean µs", "MB read", "MB written", "GB/s", "DRAM", "occupancy"]
    return _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
