"""What one request asks of the sampler and of the stop conditions. Pure data, validated at construction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from nanovllm.config import unknown_name_error

if TYPE_CHECKING:
    import torch

# (prompt token ids, token ids generated so far, logits [vocab] float32) -> logits [vocab]
LogitsProcessor = Callable[[list[int], list[int], "torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling and stop parameters of a request, in vLLM's and OpenAI's vocabulary.

    `None` means "not set": `generation_config.json` of the model supplies the value where it has one, else the
    neutral value does (temperature 1, top_p 1, top_k 0 = all, min_p 0, repetition_penalty 1).
    """

    temperature: float | None = None  # 0 = greedy
    top_p: float | None = None
    top_k: int | None = None  # 0 or -1 = all
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = 64  # None = up to the context's end
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # top alternatives to report per generated token; 0 = only the sampled one
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    logits_processors: list[LogitsProcessor] | None = None
