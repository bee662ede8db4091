"""Synthetic recordings for the profiling tests: an imitated decoder step as nsys's SQLite or PyTorch's JSON."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from nanovllm.profiling.facts import Facts
from nanovllm.profiling.recording import Recording
from nanovllm.profiling.trace import LABELS, STEP, WINDOW, read_trace

CASE = "decode-b1"

FUSED_LAYER = (
    ("gemv_kernel", 4.1, "qkv"), ("_rope_attention_kernel", 3.6, "attention"), ("gemv_kernel", 2.4, "o_proj"),
    ("gemv_kernel", 5.6, "gate_up"), ("gemv_kernel", 3.1, "down"),
)  # fmt: skip
PLAIN_LAYER = (
    ("_rms_norm_kernel", 2.0, "norm"), ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", 4.6, "qkv"),
    ("_qk_norm_rope_store_kernel", 2.2, "rope"), ("_decode_kernel", 5.1, "attention"),
    ("_merge_kernel", 2.1, "attention"),
    ("nvjet_tst_64x8_64x16_2x1_v_bz_splitK_TNT", 3.1, "o_proj"), ("_rms_norm_kernel", 2.0, "norm"),
    ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", 6.0, "gate_up"), ("_silu_mul_kernel", 1.9, "activation"),
    ("nvjet_tst_64x8_64x16_2x1_v_bz_splitK_TNT", 3.9, "down"),
)  # fmt: skip
HEAD = (("_rms_norm_kernel", 2.0, "final norm"), ("nvjet_tst_128x8_64x12_2x1_v_bz_TNT", 118.0, "head"),
        ("_chunk_kernel", 7.0, "sample"), ("_pick_kernel", 2.0, "sample"))  # fmt: skip
FUSED_HEAD = (("gemv_kernel", 112.0, "head"), ("_pick_kernel", 2.0, "sample"))
EMBED = (("indexSelectSmallIndex", 1.8, "prepare"),)

Kernel = tuple[str, float, str]  # name, µs, role


def step_kernels(fused: bool, layers: int) -> list[Kernel]:
    """The kernels of one decode step."""
    middle = list(FUSED_LAYER if fused else PLAIN_LAYER) * layers
    return [*EMBED, *middle, *(FUSED_HEAD if fused else HEAD)]


def facts(fusion: str, layers: int = 28, **changes: object) -> Facts:
    """Qwen3-0.6B's shape at batch 1."""
    base = Facts(
        case=CASE, fusion=fusion, model="Qwen3-0.6B", device="Synthetic GPU", dtype="bfloat16", element_size=2,
        torch="2.11.0", triton="3.6.0", version="0.1.0", graphs=True, wall_ms_per_step=1.0, copy_gb_s=3000.0,
        num_layers=layers, hidden_size=1024, intermediate_size=3072, num_heads=16, num_kv_heads=8, head_dim=128,
        vocab_size=151936, tokens=1.0, rows=1.0, kv_tokens=150.0,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def schedule(kernels: Sequence[Kernel], steps: int, gap: float, host: float, begin: int = 10_000) -> list[list[tuple]]:
    """[(name, start ns, end ns)] for each step: `gap` µs between kernels (negative: overlap), `host` between steps."""
    out, clock = [], begin
    for k in range(steps):
        step = []
        for i, (name, length, _) in enumerate(kernels):
            wobble = 1 + 0.04 * ((7 * i + 3 * k) % 5 - 2)
            end = clock + round(length * wobble * 1000)
            step.append((name, clock, end))
            clock = end + round(gap * 1000)
        out.append(step)
        clock = step[-1][2] + round(host * 1000)
    return out


def write_nsys(path: Path, steps: Sequence[Sequence[tuple]], *, ranges: bool = True) -> Path:
    """The tables that `nsys export -t sqlite` makes, with one graph launch a step and a stray kernel before it all."""
    path.unlink(missing_ok=True)
    db = sqlite3.connect(path)
    db.execute("create table StringIds (id integer primary key, value text)")
    db.execute(
        "create table CUPTI_ACTIVITY_KIND_KERNEL (start int, end int, streamId int, correlationId int, "
        "demangledName int, shortName int, graphNodeId int)"
    )
    db.execute("create table CUPTI_ACTIVITY_KIND_RUNTIME (start int, end int, correlationId int, nameId int)")
    db.execute("create table NVTX_EVENTS (start int, end int, text text, textId int)")
    names = {name: i for i, name in enumerate(sorted({k[0] for step in steps for k in step} | {"stray_kernel"}), 1)}
    db.executemany("insert into StringIds values (?, ?)", [(i, name) for name, i in names.items()])
    db.execute("insert into StringIds values (999, ?)", (STEP,))
    first = steps[0][0][1]
    db.execute(
        "insert into CUPTI_ACTIVITY_KIND_KERNEL values (?, ?, 7, 1, ?, 0, null)", (100, 900, names["stray_kernel"])
    )
    for k, step in enumerate(steps):
        launched = step[0][1] - 500
        db.execute("insert into CUPTI_ACTIVITY_KIND_RUNTIME values (?, ?, ?, 0)", (launched, launched + 90, 100 + k))
        db.executemany(
            "insert into CUPTI_ACTIVITY_KIND_KERNEL values (?, ?, 7, ?, ?, 0, ?)",
            [(start, end, 100 + k, names[name], i + 1) for i, (name, start, end) in enumerate(step)],
        )
        if ranges:
            db.execute("insert into NVTX_EVENTS values (?, ?, null, 999)", (launched - 200, step[-1][2] + 100))
    if ranges:
        db.execute(
            "insert into NVTX_EVENTS values (?, ?, ?, null)",
            (first - 2000, steps[-1][-1][2] + 2000, f"{WINDOW} {CASE}"),
        )
    db.commit()
    db.close()
    return path


def write_torch(path: Path, steps: Sequence[Sequence[tuple]], case: str = CASE) -> Path:
    """The same as a Chrome trace: microseconds with fractions."""
    first, last = steps[0][0][1] - 2000, steps[-1][-1][2] + 2000
    items = [_item("user_annotation", f"{WINDOW} {case}", first, last)]
    for k, step in enumerate(steps):
        launched = step[0][1] - 500
        items.append(_item("user_annotation", STEP, launched - 200, step[-1][2] + 100))
        items.append(_item("cuda_runtime", "cudaGraphLaunch", launched, launched + 90, correlation=100 + k))
        items += [
            _item("kernel", name, start, end, correlation=100 + k, stream=7, **{"graph node id": i + 1})
            for i, (name, start, end) in enumerate(step)
        ]
    path.write_text(json.dumps({"traceEvents": items}))
    return path


def _item(category: str, name: str, start: int, end: int, **arguments: int) -> dict[str, object]:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": start / 1000,
        "dur": (end - start) / 1000,
        "args": arguments,
    }


MODULES = {
    "prepare": "model.embed_tokens", "norm": "model.layers.{}.input_layernorm", "final norm": "model.norm",
    "qkv": "model.layers.{}.self_attn.qkv_proj", "rope": "model.layers.{}.self_attn.rope",
    "attention": "model.layers.{}.self_attn.attention", "o_proj": "model.layers.{}.self_attn.o_proj",
    "gate_up": "model.layers.{}.mlp.gate_up_proj", "activation": "model.layers.{}.mlp.act",
    "down": "model.layers.{}.mlp.down_proj", "head": "lm_head",
}  # fmt: skip


def step_layers(fused: bool, layers: int) -> list[int | None]:
    """The layer of every kernel of `step_kernels`."""
    middle = [layer for layer in range(layers) for _ in (FUSED_LAYER if fused else PLAIN_LAYER)]
    return [*[None] * len(EMBED), *middle, *[None] * len(FUSED_HEAD if fused else HEAD)]


def add_labels(path: Path, kernels: Sequence[Kernel], layers: Sequence[int | None]) -> None:
    """One step more in an nsys export: every kernel launched by itself, inside the range of its module."""
    db = sqlite3.connect(path)
    known = dict(db.execute("select value, id from StringIds"))
    (begin,) = db.execute("select max(end) + 1000 from NVTX_EVENTS").fetchone()
    clock = begin + 1000
    for i, ((name, length, role), layer) in enumerate(zip(kernels, layers, strict=True)):
        launched, end, module = begin + 10 * i + 3, clock + round(length * 1000), MODULES.get(role, "").format(layer)
        if module:
            outer = f"model.layers.{layer}" if layer is not None else "model"
            for part in (outer, module):
                db.execute("insert into NVTX_EVENTS values (?, ?, ?, null)", (launched - 2, launched + 2, part))
        db.execute("insert into CUPTI_ACTIVITY_KIND_RUNTIME values (?, ?, ?, 0)", (launched, launched + 1, 90000 + i))
        values = (clock, end, 90000 + i, known[name])
        db.execute("insert into CUPTI_ACTIVITY_KIND_KERNEL values (?, ?, 7, ?, ?, 0, null)", values)
        clock = end
    db.execute("insert into NVTX_EVENTS values (?, ?, ?, null)", (begin, clock + 1000, f"{LABELS} {CASE}"))
    db.commit()
    db.close()


def recording(path: Path, facts: Facts, counters: str = "") -> Recording:
    """A written trace with its facts."""
    return Recording(facts, read_trace(path), counters)
