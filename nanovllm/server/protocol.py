"""What a request asks: the fields of a JSON body, taken one by one, and the `SamplingParams` they make.

A field that nobody takes is an error that names it: nothing is accepted and ignored. null asks for nothing, in any
field. The values are judged by `SamplingParams`; this module finds the field that its sentence is about.
It knows neither prompts nor answers.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from nanovllm.sampling_params import LogitsProcessor, SamplingParams
from nanovllm.server.errors import ApiError

MAX_STOP = 64  # each is looked for after every token, on the engine's thread
# What a caller tells a provider about itself or its habits: there is nothing here that could depend on it.
_NO_EFFECT = ["user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"]
_NO_EFFECT += ["parallel_tool_calls"]  # without tools
# What we cannot do, with the values that do not ask for it.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (),  # `completions` takes it; a chat template writes its own
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),  # a program for our sandbox: the server's own is chosen when it starts
    "continuous_usage_stats": (False,),  # of stream_options
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),  # without functions
    "functions": ([],),
    "include_obfuscation": (False,),  # of stream_options: padding against listeners who count bytes
    "include_reasoning": (True,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "priority": (0,),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),  # without tools
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Fields of SamplingParams that JSON spells the same way; the others have rules of their own.
_PLAIN = [
    field.name
    for field in dataclasses.fields(SamplingParams)
    if field.name not in ("max_tokens", "logprobs", "prompt_logprobs", "logits_processors")
]
_INTEGERS = {field.name for field in dataclasses.fields(SamplingParams) if field.type in ("int", "int | None")}


def parse_json(data: bytes) -> Any:
    """The value of a body in UTF-8. ApiError for anything else, NaN and infinities included."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not UTF-8: {error}") from error
    except RecursionError as error:
        raise ApiError("the body is nested too deeply") from error
    except ValueError as error:
        raise ApiError(f"the body is not valid JSON: {error}") from error


class Body:
    """The fields of a request, each of which somebody has to take."""

    def __init__(self, value: Any, size: int = 0) -> None:
        """`size`: of the body in bytes."""
        if not isinstance(value, dict):
            raise ApiError("the body must be a JSON object")
        self._left: dict[str, Any] = dict(value)
        self._known: list[str] = []
        self.size = size

    def __contains__(self, name: str) -> bool:
        return self._left.get(name) is not None

    def take(self, name: str, default: Any = None) -> Any:
        """A field's value; `default` where it is absent or null."""
        self._known.append(name)
        value = self._left.pop(name, None)
        return default if value is None else value

    def _typed(self, name: str, kind: type, rule: str, default: Any) -> Any:
        value = self.take(name, default)
        if value is not default and not isinstance(value, kind):
            raise ApiError(f"{name} must be {rule}, got {value!r:.80}", param=name)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        return bool(self._typed(name, bool, "true or false", default))

    def text(self, name: str) -> str | None:
        """A string."""
        return self._typed(name, str, "a string", None)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object; {} where there is none."""
        return self._typed(name, dict, "an object", None) or {}

    def refuse_rest(self) -> None:
        """ApiError for what is left: fields that ask for what we cannot do, and names that nobody knows."""
        for name in _NO_EFFECT:
            self.take(name)
        if self._left.get("tool_choice") == "none":
            self.take("tools")  # offered, and then forbidden
        for name in [name for name, value in self._left.items() if value is not None]:
            value = self._left[name]
            if name in _UNSUPPORTED:
                if value in _UNSUPPORTED[name]:
                    continue
                raise ApiError(f"{name}={value!r:.80} is not supported: leave it out", param=name)
            close = difflib.get_close_matches(name, self._known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ": leave it out"
            raise ApiError(f"there is no field {name[:80]!r}{hint}", param=name[:80])


def read_stream(body: Body) -> tuple[bool, bool]:
    """(stream, stream_options.include_usage)."""
    stream, options = body.flag("stream"), Body(body.mapping("stream_options"))
    include_usage = options.flag("include_usage")
    try:
        options.refuse_rest()
    except ApiError as error:
        raise ApiError(str(error), param=f"stream_options.{error.param}") from error
    if include_usage and not stream:
        raise ApiError("stream_options is for stream=true", param="stream_options")
    return stream, include_usage


def read_sampling(body: Body, processors: Sequence[LogitsProcessor] = (), **special: tuple[str, Any]) -> SamplingParams:
    """The sampling parameters of a body.

    `special`: what an endpoint spells in its own way, name of `SamplingParams` -> (field of the body, value).
    """
    asked = {name: (name, body.take(name)) for name in _PLAIN} | special
    values: dict[str, Any] = {"max_tokens": None}
    values |= {name: _plain(name, value) for name, (_, value) in asked.items() if value is not None}
    try:
        params = SamplingParams(**values, logits_processors=list(processors) or None)
    except ValueError as error:
        field = asked[name][0] if (name := _culprit(values)) in asked else "min_tokens"
        raise ApiError(str(error) if field == name else f"{field}: {error}", param=field) from error
    if len(params.stop_strings) > MAX_STOP:
        raise ApiError(f"stop has {len(params.stop_strings)} strings: send {MAX_STOP} at most", param="stop")
    if processors and (params.ignore_eos or params.min_tokens):  # nothing may follow a complete answer
        field = "ignore_eos" if params.ignore_eos else "min_tokens"
        raise ApiError(f"{field} and response_format contradict each other: leave out one of the two", param=field)
    return params


def _culprit(values: dict[str, Any]) -> str:
    """The first parameter that is refused by itself; else it is a pair, and of those there is one."""
    for name, value in values.items():
        try:
            SamplingParams(**{"max_tokens": None, name: value})
        except ValueError:
            return name
    return "min_tokens"


def _plain(name: str, value: Any) -> Any:
    """A JSON value as Python spells it: 1.0 is an integer, and the keys of objects are strings."""
    if name in _INTEGERS and isinstance(value, float) and value.is_integer():
        return int(value)
    if name == "logit_bias" and isinstance(value, dict):
        return {int(key) if re.fullmatch("[0-9]{1,18}", key) else key: bias for key, bias in value.items()}
    return value
