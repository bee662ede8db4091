"""Sampling defaults that come with a model: `generation_config.json`, or the sampling keys of a GGUF file."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanovllm.loader.gguf_file import read_gguf
from nanovllm.loader.resolve import ModelSource

logger = logging.getLogger(__name__)

_GGUF_KEYS = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
# Keys that change the text and have no counterpart here, with the value that asks for nothing (null does as well).
# Lengths and the beams of a search are a request's own affair.
_UNSUPPORTED: dict[str, Any] = {
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "bad_words_ids": [],
    "sequence_bias": {},
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "no_repeat_ngram_size": 0,
    "typical_p": 1,
    "guidance_scale": 1,
}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Values for the sampling parameters that a request leaves unset; None where the model says nothing.

    `do_sample` is ignored, as vLLM does: it is missing from many files whose models are meant to be sampled, and
    whoever wants greedy decoding says `temperature=0`.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()


def load_generation_config(source: ModelSource, *, warn: bool = True) -> GenerationDefaults:
    """The defaults of a model, empty where it brings none. ValueError for a value that is no number.

    warn: say in the log what the model asks for and does not get.
    """
    if source.kind == "gguf":
        metadata = read_gguf(source.path).metadata
        raw = {ours: metadata.get(f"general.sampling.{key}") for ours, key in _GGUF_KEYS.items()}
        return _parse(raw, source.path.name)
    path = source.path / "generation_config.json"
    if not path.is_file():
        return GenerationDefaults()
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again or delete it") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no JSON object: fetch it again or delete it")
    if warn and (asked := [key for key, neutral in _UNSUPPORTED.items() if raw.get(key) not in (None, neutral)]):
        logger.warning(
            "%s asks for %s, which is not supported: the text may differ; a logits processor can do it",
            path.name, ", ".join(asked),
        )  # fmt: skip
    return _parse(raw, str(path))


def _parse(raw: Mapping[str, Any], origin: str) -> GenerationDefaults:
    numbers: dict[str, Any] = {}
    for name in _GGUF_KEYS:
        value = raw.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
            raise ValueError(f"{origin}: {name} is {value!r}, but must be a number, and finite")
        numbers[name] = int(value) if name == "top_k" else float(value)
    return GenerationDefaults(**numbers, eos_token_ids=as_ids(raw.get("eos_token_id"), "eos_token_id", origin))


def as_ids(value: Any, key: str, origin: str) -> tuple[int, ...]:
    """Token ids from null, an integer or a list of integers."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ValueError(f"{origin}: {key} is {value!r}, but must be an integer or a list of integers")
    return tuple(ids)
