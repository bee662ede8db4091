"""A request on its way through the engine: n sequences, and the text and statistics that grow out of them.

The scheduler knows sequences of tokens; this module knows what the user sees. Text is decoded step by step only when
somebody watches it (a stream or a stop string); otherwise once, at the end.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.loader.detokenizer import IncrementalDetokenizer, StopChecker
    from nanovllm.loader.tokenizer import Tokenizer


@dataclass(slots=True, eq=False)
class Completion:
    """One of a request's n answers: its sequence and the text decoded so far."""

    seq: Sequence
    detokenizer: IncrementalDetokenizer | None = None  # None: the text is decoded once, at the end
    stop_checker: StopChecker | None = None
    text: str = ""
    include_stop: bool = False  # whether the token or string that ended it belongs to the text
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float = 0.0
    finished: bool = False  # ended, and its text is complete

    def on_token(self, token_id: int) -> str | None:
        """Take in a new token; returns the stop string that it completed, if it did."""
        if self.detokenizer is None or self._hides_last():
            return None
        new_text = self.detokenizer.add([token_id])
        if self.stop_checker is None:
            self.text += new_text
            return None
        visible, stop = self.stop_checker.add(new_text, may_stop=self.seq.num_output_tokens > self.seq.min_tokens)
        self.text += visible
        return stop

    def flush(self, tokenizer: Tokenizer | None, params: SamplingParams) -> None:
        """The sequence has ended: bring the text up to its last token."""
        if self.detokenizer is None:
            if tokenizer is not None:
                ids = self.seq.output_token_ids
                visible = ids[:-1] if self._hides_last() else ids
                self.text = tokenizer.decode(visible, skip_special_tokens=params.skip_special_tokens)
            return
        if isinstance(self.seq.stop_reason, str):
            return  # what lies behind a stop string stays hidden
        tail = self.detokenizer.flush()
        if self.stop_checker is None:
            self.text += tail
            return
        shown, stop = self.stop_checker.add(tail)
        self.text += shown if stop is not None else shown + self.stop_checker.flush()

    def _hides_last(self) -> bool:
        """The EOS or stop token that ended the sequence is not part of its text, unless asked for."""
        return self.seq.finish_reason == "stop" and not self.include_stop


@dataclass(slots=True, eq=False)
class Request:
    """What `LLMEngine.make_request` returns. `version` grows whenever `output()` would tell something new."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    completions: list[Completion]
    tokenizer: Tokenizer | None
    arrival_time: float = field(default_factory=time.monotonic)
    scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_unfinished: int = field(init=False)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: str | None = None
    version: int = 0

    def __post_init__(self) -> None:
        self.num_unfinished = len(self.completions)
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]  # nothing predicts the first token

    @property
    def finished(self) -> bool:
        """Whether all completions have ended."""
        return self.num_unfinished == 0

    def on_token(self, completion: Completion, token_id: int) -> str | None:
        """A completion got a token; returns the stop string it completed, if any."""
        if self.first_token_time is None:
            self.first_token_time = time.monotonic()
        stop = completion.on_token(token_id)
        self.version += 1  # last: another thread that sees the new version must find what is new
        return stop

    def on_finished(self, completion: Completion) -> None:
        """A completion's sequence has ended, for whatever reason."""
        try:
            completion.flush(self.tokenizer, self.params)
        except Exception as error:  # the tokens are there; whoever waits must not wait for ever
            self.error = self.error or f"its text cannot be made: {type(error).__name__}: {error}"
        if self.num_unfinished == 1:
            self.finished_time = time.monotonic()
        completion.finished = True
        self.num_unfinished -= 1
        self.version += 1

    def output(self) -> RequestOutput:
        """A snapshot for the user; other threads may step meanwhile."""
        finished = self.finished  # read first: a snapshot that calls itself finished must be complete
        first = self.completions[0].seq
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.prompt_token_ids),  # a copy: the engine goes on reading its own
            outputs=[self._completion_output(completion) for completion in self.completions],
            finished=finished,
            prompt_logprobs=self.prompt_logprobs,
            error=self.error,
            metrics=RequestMetrics(
                arrival_time=self.arrival_time,
                scheduled_time=self.scheduled_time,
                first_token_time=self.first_token_time,
                finished_time=self.finished_time,
                num_cached_tokens=first.num_cached_tokens,
                num_preemptions=sum(completion.seq.num_preemptions for completion in self.completions),
            ),
        )

    def _completion_output(self, completion: Completion) -> CompletionOutput:
        seq = completion.seq
        return CompletionOutput(
            index=seq.index,
            text=completion.text,
            token_ids=list(seq.output_token_ids),
            cumulative_logprob=None if completion.logprobs is None else completion.cumulative_logprob,
            logprobs=None if completion.logprobs is None else list(completion.logprobs),
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
        )


def check_request_id(request_id: object) -> None:
    """TypeError for what is no string: it may be no key of a dictionary, which the engine would notice too late."""
    if not isinstance(request_id, str):
        raise TypeError(f"request_id must be a string, got {request_id!r}")
