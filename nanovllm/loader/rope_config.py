"""The rotary part of a config.json -> `RopeConfig`.

Three spellings are in use: `rope_theta` beside `rope_scaling` with `type` or, later, `rope_type`; and since
transformers 5 everything inside `rope_parameters`. Keys that nobody here computes with are refused, because a
rotation that is nearly right gives text that is nearly right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanovllm.config import SUPPORTED_ROPE_TYPES, RopeConfig

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}
# Fields of RopeConfig under the same name, and keys handled one by one ("finetuned" is a remark without effect).
_NUMBERS = {"factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"}
_NUMBERS |= {"attention_factor", "mscale", "mscale_all_dim"}
_OTHERS = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
_OTHERS |= {"truncate", "finetuned"}


def parse_rope(config: Mapping[str, Any], max_position: int, origin: str) -> RopeConfig:
    """ValueError for a type, key or value that we would have to ignore; `origin` names the file."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise ValueError(f"{origin}: the rotary parameters are {scaling!r}, but must be an object")
    nested = [key for key, value in scaling.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"{origin}: rotary parameters per layer type ({', '.join(nested)}) are not supported")
    rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise ValueError(
            f"{origin}: RoPE type {rope_type!r} is not supported; supported are {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    unknown = sorted(key for key in scaling.keys() - _NUMBERS - _OTHERS if scaling[key] is not None)
    if unknown:
        raise ValueError(f"{origin}: the rotary parameter {unknown[0]!r} is not supported for RoPE type {rope_type!r}")
    partial = _first(scaling.get("partial_rotary_factor"), config.get("partial_rotary_factor"), 1.0)
    if partial != 1.0:
        raise ValueError(f"{origin}: partial_rotary_factor is {partial}, but only 1 is supported")
    missing = [key for key in _REQUIRED[rope_type] if scaling.get(key) is None]
    if missing:
        raise ValueError(f"{origin}: RoPE type {rope_type!r} needs {missing[0]!r}, which is missing")
    numbers: dict[str, Any] = {
        key: as_number(scaling[key], key, origin) for key in sorted(_NUMBERS) if scaling.get(key) is not None
    }
    original = None
    if rope_type in ("llama3", "yarn"):
        name = "original_max_position_embeddings"  # beside the parameters it wins over inside them
        original = int(_first(config.get(name), scaling.get(name), max_position))
        numbers.setdefault("factor", max_position / original)
    return RopeConfig(
        rope_type=rope_type,
        theta=as_number(_first(scaling.get("rope_theta"), config.get("rope_theta"), 10000.0), "rope_theta", origin),
        original_max_position=original,
        truncate=bool(_first(scaling.get("truncate"), True)),
        **numbers,
    )


def as_number(value: Any, key: str, origin: str) -> float:
    """A positive number from a config.json (YaRN's two mscale may be 0); ValueError for anything else."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or value < 0
        or (value == 0 and "mscale" not in key)
    ):
        raise ValueError(f"{origin}: {key} is {value!r}, but must be a positive number")
    return float(value)


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)
