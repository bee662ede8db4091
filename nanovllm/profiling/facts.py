"""What was profiled: cases, and the facts of a run that a trace does not hold."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to profile: `warm` steps that nobody looks at, then `steps` that count.

    `isolated` steps are requests of their own, waited for; others follow each other as in serving.
    """

    name: str
    title: str
    batch: int
    prompt: int  # tokens of each prompt; 0 = drawn
    warm: int
    steps: int
    isolated: bool = False
    note: str = ""


# The workload comes first: what runs before the first recorded step of a process need not be recorded.
CASES = {
    case.name: case
    for case in (
        Case(
            "workload", "nano-vLLM's bench.py, 256 requests", 256, 0, 450, 32,
            note="A slice of the workload's steady state: the 32 decode steps behind the first 450, when the prompts "
            "are done and about as many requests run as in the mean of all steps",
        ),
        Case("decode-b1", "Decode, batch 1, prompt 128", 1, 128, 12, 32),
        Case("decode-b16", "Decode, batch 16, prompt 128", 16, 128, 12, 32),
        Case("prefill-2048", "Prefill of 2,048 tokens", 1, 2048, 3, 8, isolated=True),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Facts:
    """One recorded run. Sizes are elements, bandwidth is GB/s, times are as their names say."""

    case: str
    fusion: str  # "off", "on" or "auto"
    model: str
    device: str
    dtype: str
    element_size: int
    torch: str
    triton: str
    version: str
    graphs: bool
    wall_ms_per_step: float  # host clock, synchronised on both sides
    copy_gb_s: float  # measured: device-to-device copy of 1 GiB, bytes read and written
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tokens: float  # processed by a step, mean
    rows: float  # logits computed by a step, mean
    kv_tokens: float  # keys that a step reads, summed over its sequences, mean; 0 = not known
    profiler: str = "nsys"
    note: str = ""
    # Measured by a process without any recorder, µs; 0 = not measured (a graph: or there is none).
    free_step_us: float = 0.0  # host clock from step to step, median
    free_wait_us: float = 0.0  # of it, the host waiting for the device, mean
    free_graph_us: float = 0.0  # the step's CUDA graph replayed back to back
    date: str = ""
    commit: str = ""

    def to_json(self) -> str:
        """As an object of its fields."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Facts:
        """Inverse of `to_json`. ValueError for anything else."""
        try:
            found: dict[str, Any] = json.loads(text)
            return cls(**{f.name: found[f.name] for f in fields(cls)})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"not the facts of a profiled run: {error}") from error


def bytes_by_role(facts: Facts) -> dict[str, float]:
    """Bytes that each role must move in one whole step: weights once, activations in and out once, KV read and written.

    Roles whose traffic is not known (prefill attention, sampling) are missing. What a fused kernel does besides its
    role (a norm, a residual) moves activations only, which are negligible beside the weights at small batches.
    """
    e, t, h, inner = facts.element_size, facts.tokens, facts.hidden_size, facts.intermediate_size
    q, kv = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    layer = {
        "norm": 2 * 4 * t * h,  # two norms, each reads the branch and the residual and writes both
        "qkv": (h + t) * (q + 2 * kv) + t * h,
        "rope": t * (2 * q + 4 * kv),
        "o_proj": (q + t) * h + t * q,
        "gate_up": (h + t) * 2 * inner + t * h,
        "activation": 3 * t * inner,
        "down": (inner + t) * h + t * inner,
    }
    if facts.kv_tokens:
        layer["attention"] = 2 * kv * facts.kv_tokens + 2 * q * t
    total = {role: elements * e * facts.num_layers for role, elements in layer.items()}
    total["head"] = e * (facts.vocab_size * (facts.hidden_size + facts.rows) + facts.rows * h)
    return total
