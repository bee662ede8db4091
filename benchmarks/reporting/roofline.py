"""Arithmetic intensity and achieved FLOP/s of the operator's rows, from the shapes of the models."""

from __future__ import annotations

from collections.abc import Sequence

from harness.models import SHAPES
from harness.records import Record

from reporting.query import select


def problem(model: str, layer: str) -> tuple[int, int] | None:
    """[N, K] of the weight that a row multiplies by; None for a layer or model that has no known shape."""
    shape = SHAPES.get(model)
    if shape is None:
        return None
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    head = shape["head_dim"]
    q, kv = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    weights = {
        "qkv": (q + 2 * kv, hidden),
        "gate_up": (2 * inner, hidden),
        "gate_up+swiglu": (2 * inner, hidden),
        "lm_head": (shape["vocab_size"], hidden),
    }
    return weights.get(layer)


def points(records: Sequence[Record], form: str, element_size: int = 2) -> list[tuple[float, float]]:
    """(FLOP per byte, FLOP/s) of every row in one form; bytes are the weight once and the activations once."""
    found = []
    for r in select(records, options=f"* {form}"):
        layer, m = r.options.removesuffix(f" {form}"), int(r.batch)
        weight = problem(r.model, layer)
        if weight is not None:
            n, k = weight
            out = n // 2 if "swiglu" in layer else n
            flop = 2.0 * m * n * k
            found.append((flop / (element_size * (n * k + m * k + m * out)), flop / (r.value * 1e-6)))
    return found


def roofs(records: Sequence[Record], peaks: tuple[float, float]) -> tuple[tuple[float, str], tuple[float, str]]:
    """(B/s, its source), (FLOP/s, its source): measured on the device, where there is such a row, or from `peaks`."""
    found = []
    for metric, peak in zip(("read_bytes_per_s", "bf16_flop_per_s"), peaks, strict=True):
        measured = [r.value for r in select(records, metric=metric) if r.test in ("roof", "fusion_operator")]
        found.append((max(measured), "measured") if measured else (peak, "data sheet"))
    return found[0], found[1]
