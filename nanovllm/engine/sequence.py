"""One sequence: its tokens, how far its KV cache reaches, and which blocks hold it.

A request with `n > 1` becomes n sequences. A sequence is only data; the scheduler moves it between states:

    WAITING --admitted--> RUNNING --stop, length, abort, error--> FINISHED
       ^-----preempted-------'

Prompt and output are one row of tokens to everything below the API, so there is no "prefill state" and no "decode
state": a sequence has `num_tokens` tokens, the KV of the first `num_computed_tokens` exists, and the difference is
what is left to run. Many tokens left is a prefill, one is a decode, and a preempted sequence is simply one whose
KV is gone. (vLLM's V1 scheduler introduced this view.)

This module knows nothing of schedulers, models or text; `sampling` passes through it unread.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class SequenceStatus(Enum):
    """Where a sequence is: in the queue, in the running set (it holds blocks), or done."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)  # eq=False: a sequence is equal to itself only
class Sequence:
    """The engine's record of one completion in the making. Token counts are in tokens, ids index the vocabulary."""

    seq_id: int
    request_id: str
    prompt_token_ids: list[int]
    # Stop rules, resolved to plain values by the engine.
    max_tokens: int = field(kw_only=True)  # output tokens, at least 1
    min_tokens: int = field(default=0, kw_only=True)  # no EOS and no stop id ends the sequence before this many
    eos_token_ids: frozenset[int] = field(default=frozenset(), kw_only=True)
    stop_token_ids: frozenset[int] = field(default=frozenset(), kw_only=True)
    ignore_eos: bool = field(default=False, kw_only=True)
    # Prefix cache.
    cache_salt: bytes = field(default=b"", kw_only=True)  # sequences share blocks only under the same salt
    read_prefix_cache: bool = field(default=True, kw_only=True)  # False: compute all tokens (prompt logprobs)
    index: int = field(default=0, kw_only=True)  # which of its request's n completions this is
    sampling: Any = field(default=None, kw_only=True)  # for the sampler; opaque here
    num_prompt_logprobs: int | None = field(default=None, kw_only=True)  # alternatives to report per prompt token

    # State: written by the scheduler and the block manager only.
    status: SequenceStatus = field(default=SequenceStatus.WAITING, init=False)
    arrival: int = field(default=-1, init=False)  # position in the order of arrival, set by `Scheduler.add`
    token_ids: list[int] = field(init=False)  # prompt and output
    output_token_ids: list[int] = field(default_factory=list, init=False)
    num_tokens: int = field(init=False)  # len(token_ids)
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = field(default=0, init=False)  # KV exists, or a step in flight is writing it
    block_table: list[int] = field(default_factory=list, init=False)  # block i holds tokens [i*bs, (i+1)*bs)
    block_digests: list[bytes] = field(default_factory=list, init=False)  # of the full blocks hashed so far
    num_in_flight: int = field(default=0, init=False)  # tokens that steps in flight sample: they exist, unknown yet
    num_cached_tokens: int = field(default=0, init=False)  # found in the prefix cache at first admission
    num_preemptions: int = field(default=0, init=False)
    finish_reason: str | None = field(default=None, init=False)  # stop | length | abort | error
    stop_reason: int | str | None = field(default=None, init=False)  # the stop token id or string that ended it

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        self.num_tokens = self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def append_token(self, token_id: int) -> None:
        """Add a sampled token. Its KV does not exist yet: the next step computes it."""
        self.token_ids.append(token_id)
        self.output_token_ids.append(token_id)
        self.num_tokens += 1
