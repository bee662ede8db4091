"""What a request gives back. Frozen: an output handed to the user never changes under them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability (natural log, of the model's raw distribution) of one token and its rank (1 = most likely)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of the `n` answers of a request; `finish_reason`: None while it runs, then stop | length | abort | error."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None  # one entry a token: the sampled one and the top ones
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the stop string or stop token id that ended it


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times in seconds on the engine's monotonic clock."""

    arrival_time: float
    scheduled_time: float | None = None  # when its first tokens ran
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """State of one request: its prompt and its completions so far.

    Also answers `output["text"]` and `output["token_ids"]` of the first completion, as nano-vLLM does.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: str | None = None  # one sentence, when this request failed
    metrics: RequestMetrics | None = None

    def __getitem__(self, key: str) -> Any:
        if key in ("text", "token_ids"):
            return getattr(self.outputs[0], key)
        raise KeyError(f"{key!r}: a RequestOutput answers 'text' and 'token_ids'; use its attributes for the rest")
