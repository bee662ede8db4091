"""A profile as rows of `metrics.csv`: the step, and where its time goes by role."""

from __future__ import annotations

import datetime

from harness.records import Record

from nanovllm.profiling.distil import Profile
from nanovllm.profiling.facts import CASES


def today() -> str:
    """The date of a run, ISO."""
    return datetime.date.today().isoformat()


def profile_rows(profile: Profile) -> list[Record]:
    """µs of a step: its median, and for each role exposed time and gap (means). Options name case, fusion and role.

    free_*: measured without a recorder, beside the recorded steps.
    """
    f, case = profile.facts, CASES[profile.facts.case]
    prompt, out = ("100-1024", "100-1024") if case.name == "workload" else (str(case.prompt), "")
    steps = f", steps {case.warm} to {case.warm + case.steps}" if case.name == "workload" else ""
    shared = dict(
        version=f.version, model=f.model, device=f.device, dtype=f.dtype, weights="random", batch=str(case.batch),
        prompt=prompt, out=out, date=f.date, commit=f.commit, torch=f.torch, triton=f.triton,
        note=profile.source + steps,
    )  # fmt: skip

    def row(metric: str, value: float, what: str = "") -> Record:
        options = f"case={case.name} fusion={f.fusion}" + (f" role={what.replace(' ', '_')}" if what else "")
        return Record("profile", metric, value, options=options, **shared)

    rows = [
        row("step_us", profile.period_us),
        row("kernels", profile.kernels_per_step),
        row("idle_share", profile.idle_share),
    ]
    free = {"free_step_us": f.free_step_us, "free_wait_us": f.free_wait_us, "free_graph_us": f.free_graph_us}
    rows += [row(metric, us) for metric, us in free.items() if us]
    rows += [row("gb_s", profile.gb_s)] if profile.gb_s is not None else []
    for role in profile.roles:
        rows += [row("exposed_us", role.exposed_us, role.name), row("gap_us", role.gap_us, role.name)]
    return rows
