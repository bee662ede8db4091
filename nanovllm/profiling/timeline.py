"""The timeline as one HTML file that needs nothing else: a canvas, its data and 200 lines of JavaScript.

The page is `timeline.html` beside this module; here its data is made. Lanes share one scale, so that a fused step is
seen to be shorter. Opened with `#one-layer` in its address it starts zoomed to one layer.
"""

from __future__ import annotations

import html
import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanovllm.profiling.attribute import ROLES
from nanovllm.profiling.distil import Profile
from nanovllm.profiling.facts import CASES
from nanovllm.profiling.report import LABELS

_PAGE = Path(__file__).with_name("timeline.html")

# (light, dark). Linears are blue and green, attention is warm, what fusion removes is red, the ends are violet.
COLORS = {
    "prepare": ("#9aa1a9", "#7b838c"),
    "norm": ("#c2485b", "#d9667a"),
    "qkv": ("#3a6ea8", "#5a8fca"),
    "rope": ("#d99a2b", "#dba847"),
    "attention": ("#d9703a", "#e2864f"),
    "o_proj": ("#6a9fd0", "#82b2de"),
    "gate_up": ("#2c8a7d", "#3fa899"),
    "activation": ("#d98a9b", "#e3a0ae"),
    "down": ("#63b3a2", "#7cc7b6"),
    "layer": ("#54789c", "#7396ba"),
    "final norm": ("#a33d6d", "#c25e8d"),
    "head": ("#6a5aa8", "#8a7bc8"),
    "sample": ("#a195cc", "#b3a8da"),
    "copy": ("#c3c7cb", "#565d65"),
}


def render(profiles: Sequence[Profile]) -> str:
    """The page for one case: one lane a profile, each showing its median step. ValueError without profiles."""
    if not profiles:
        raise ValueError("a timeline needs at least one profile")
    facts = profiles[0].facts
    names: dict[str, int] = {}
    data = {
        "roles": [{"name": role, "color": COLORS[role]} for role in ROLES],
        "lanes": [_lane(p, names) for p in profiles],
        "copy": facts.copy_gb_s,
        "names": list(names),
    }
    subtitle = (
        f"{facts.device}, {facts.dtype}, torch {facts.torch}, Triton {facts.triton or 'not installed'}, "
        f"nanovllm {facts.version}; recorded with {profiles[0].source}"
    )
    notes = "".join(f'<p class="note">{html.escape(n)}.</p>' for n in sorted({p.facts.note for p in profiles} - {""}))
    return string.Template(_PAGE.read_text(encoding="utf-8")).substitute(
        title=html.escape(f"{CASES[facts.case].title}: {facts.model}"),
        subtitle=html.escape(subtitle),
        notes=notes,
        # "</" would end the script, and the two separators end a line in old JavaScript.
        data=json.dumps(data, separators=(",", ":"), ensure_ascii=True).replace("</", "<\\/"),
    )


def _lane(profile: Profile, names: dict[str, int]) -> dict[str, Any]:
    """One profile for the page; times in µs from the begin of the step. `names` collects the kernels' names."""
    step, roles = profile.median, {role: i for i, role in enumerate(ROLES)}
    events = []
    for p in step.placed:
        e, layer = p.event, p.place.layer
        name = names.setdefault(e.name, len(names))
        times = [_us(e.start - step.begin), _us(e.end - e.start)]
        place = [roles[p.place.role], -1 if layer is None else layer]
        events.append([*times, *place, name, _us(p.gap), _us(p.exposed)])
    return {
        "label": LABELS[profile.facts.fusion],
        "length": _us(step.period),
        "kernels": sum(p.event.kind == "kernel" for p in step.placed),
        "steps": len(profile.steps),
        "idle": round(step.idle / max(1, step.period), 4),
        "bandwidth": profile.gb_s,
        "events": events,
        "table": [
            {
                "role": roles[row.name],
                "calls": round(row.calls, 2),
                "exposed": round(row.exposed_us, 2),
                "gap": round(row.gap_us, 2),
                "bandwidth": row.gb_s,
            }
            for row in profile.roles
        ],
    }


def _us(nanoseconds: int) -> float:
    return round(nanoseconds / 1e3, 3)
