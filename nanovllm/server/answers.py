"""What a client is told: the choices of an answer while they grow, whole answers and usage.

A `Choice` reads the engine's `Completion`, which another thread fills: text and log-probabilities only grow, and
`finished` comes last. `Style` is what sets the chat endpoint's JSON apart from the older one's.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from nanovllm.outputs import Logprob
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.errors import ApiError, unavailable

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.engine.request import Completion, Request
    from nanovllm.loader.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # what the API says instead of minus infinity, which JSON lacks
encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class Style(Protocol):
    """How an endpoint spells its answers."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def logprobs(self, choice: Choice, start: int, stop: int) -> dict[str, Any]:
        """Log-probabilities of the choice's output tokens [start, stop)."""

    def whole(self, choice: Choice, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """The part of a finished choice that is this endpoint's own."""

    def piece(self, text: str | None) -> str:
        """The part of a chunk's choice that carries text, as JSON without its braces; None: the last, without any."""

    def opening(self, choice: Choice) -> tuple[str, dict[str, Any] | None] | None:
        """What a choice's stream begins with, as `piece` has it ("" for nothing), and log-probabilities.

        None while they are unknown.
        """


@dataclass(frozen=True, slots=True)
class Call:
    """One request, understood: what runs in the engine for it and how the answer looks."""

    engine: LLMEngine
    style: Style
    model: str
    requests: list[Request]
    stream: bool = False
    include_usage: bool = False
    echo: bool = False  # the prompt is part of the text
    scored: bool = False  # the prompt's log-probabilities are wanted in vLLM's form
    hidden: bool = False  # max_tokens=0: the engine makes one token that nobody asked for
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def choices(self) -> list[Choice]:
        """All choices, those of the first prompt first."""
        pairs = [(request, completion) for request in self.requests for completion in request.completions]
        return [Choice(self, index, *pair) for index, pair in enumerate(pairs)]

    def head(self, kind: str) -> dict[str, Any]:
        """What every answer and chunk begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def usage(self) -> dict[str, Any]:
        """Tokens that were read and made. The prompt counts once for all of its choices."""
        prompt = sum(len(request.prompt_token_ids) for request in self.requests)
        made = 0 if self.hidden else sum(len(c.seq.output_token_ids) for r in self.requests for c in r.completions)
        cached = sum(request.completions[0].seq.num_cached_tokens for request in self.requests)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def whole(self) -> dict[str, Any]:
        """The answer of a call whose requests have all finished."""
        choices = [choice.whole() for choice in self.choices()]
        return self.head(self.style.whole_object) | {"choices": choices, "usage": self.usage()}


@dataclass(slots=True)
class Choice:
    """One choice of an answer, and how much of it has been said."""

    call: Call
    index: int
    request: Request
    completion: Completion
    opened: bool = False
    closed: bool = False
    chars: int = 0
    tokens: int = 0  # whose log-probabilities were said
    offset: int = 0  # characters that those tokens stand for

    def whole(self) -> dict[str, Any]:
        """The finished choice."""
        self.check()
        style, count = self.call.style, 0 if self.call.hidden else len(self.completion.seq.output_token_ids)
        logprobs = None if self.request.params.logprobs is None else style.logprobs(self, 0, count)
        own = style.whole(self, "" if self.call.hidden else self.completion.text, logprobs)
        return {"index": self.index, **own, "logprobs": logprobs, **self.ending()}

    def ending(self) -> dict[str, Any]:
        """Why it ended."""
        seq = self.completion.seq
        if self.call.hidden:
            return {"finish_reason": "length", "stop_reason": None}
        return {"finish_reason": seq.finish_reason, "stop_reason": seq.stop_reason}

    def check(self) -> None:
        """ApiError for a choice that came to no good end."""
        reason = self.completion.seq.finish_reason
        if reason == "abort":
            raise unavailable("the engine stopped before the answer was complete")
        if reason == "error" or self.request.error:
            raise ApiError(self.request.error or "the request failed in the engine", status=500)

    def pieces(self) -> list[str]:
        """The JSON of this choice in the chunks to send now; tokens that came together go together."""
        said: list[str] = []
        style, completion = self.call.style, self.completion
        finished = completion.finished  # read first: all else is complete then
        text = "" if self.call.hidden else completion.text
        if finished:
            self.check()
        if not self.opened:
            opening = style.opening(self)
            if opening is None:
                return said
            self.opened = True
            said += [self._chunk(*opening)] if opening[0] else []
        logprobs = None
        if completion.logprobs is not None and not self.call.hidden:
            start, self.tokens = self.tokens, len(completion.logprobs)
            logprobs = style.logprobs(self, start, self.tokens) if self.tokens > start else None
        if len(text) > self.chars or logprobs is not None:
            said.append(self._chunk(style.piece(text[self.chars :]), logprobs))
            self.chars = len(text)
        if finished:
            self.closed = True
            reasons = encode(self.ending())[1:-1]
            said.append(f'{{"index":{self.index},{style.piece(None)},"logprobs":null,{reasons}}}')
        return said

    def _chunk(self, own: str, logprobs: dict[str, Any] | None) -> str:
        shown = "null" if logprobs is None else encode(logprobs)
        return f'{{"index":{self.index},{own},"logprobs":{shown},"finish_reason":null}}'


def make_call(
    engine: LLMEngine,
    style: Style,
    model: str,
    prompts: Sequence[Mapping[str, Any]],
    params: SamplingParams,
    field_name: str,
    **options: Any,
) -> Call:
    """Requests for the prompts, which have token ids, and the call around them. ApiError names the field to blame."""
    identity = f"{style.id_prefix}-{secrets.token_hex(12)}"
    try:
        params.check_token_ids(engine.model_config.vocab_size)
    except ValueError as error:
        raise ApiError(str(error), param=str(error).split()[0]) from error  # its sentence begins with the field
    requests = []
    for i, prompt in enumerate(prompts):
        count = len(prompt["prompt_token_ids"])
        try:
            engine.scheduler.check_prompt(count)
        except ValueError as error:
            code = "context_length_exceeded" if count else None
            raise ApiError(str(error), param=field_name, code=code) from error
        try:
            requests.append(
                engine.make_request(
                    prompt, params, streaming=options.get("stream", False), request_id=f"{identity}-{i}"
                )
            )
        except (ValueError, TypeError) as error:
            stops = bool(params.stop_strings) and engine.tokenizer is None
            raise ApiError(str(error), param="stop" if stops else field_name) from error
    return Call(engine, style, model, requests, id=identity, **options)


def tokenizer_of(engine: LLMEngine, param: str) -> Tokenizer:
    """The engine's tokenizer; ApiError, which blames a field, when it runs without one."""
    try:
        return engine.require_tokenizer()
    except ValueError as error:
        raise ApiError(str(error), param=param) from error


def top(entry: Mapping[int, Logprob]) -> list[tuple[int, Logprob]]:
    """The tokens of an entry, the most likely first."""
    return sorted(entry.items(), key=lambda item: item[1].rank)


def number(logprob: Logprob) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob.logprob, LOWEST_LOGPROB)


def prompt_logprobs(call: Call, request: Request) -> dict[str, Any]:
    """vLLM's field: for each token {id: {logprob, rank, decoded_token}}, null for the first; {} if nobody asked."""
    if not call.scored:
        return {}

    def described(p: Logprob) -> dict[str, Any]:
        return {"logprob": number(p), "rank": p.rank, "decoded_token": p.decoded_token}

    entries = request.prompt_logprobs or []
    return {"prompt_logprobs": [entry and {i: described(p) for i, p in entry.items()} for entry in entries]}
