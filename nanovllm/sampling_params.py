"""What one request asks of the sampler and of the stop conditions. Pure data, validated at construction.

    SamplingParams (the user's, with None for "not set") --resolve--> ResolvedSampling (the sampler's, all values known)

Both are frozen. This module knows nothing of models, tokenizers or tensors.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from nanovllm.config import unknown_name_error

if TYPE_CHECKING:
    import torch

# (prompt token ids, token ids generated so far, logits [vocab] float32) -> logits [vocab]
LogitsProcessor = Callable[[list[int], list[int], "torch.Tensor"], "torch.Tensor"]

MAX_N = 1024  # completions of one request; each of them is a sequence with its own copy of the prompt
MAX_LOGPROBS = 100  # alternatives per token; each of them becomes a Python object
LARGEST_FLOAT32 = 3.4028234663852886e38  # a larger temperature or penalty makes no difference
GREEDY_BELOW = 1e-5  # dividing by a lower temperature overflows float32, and the largest logit wins anyway

T = TypeVar("T")


def reject_unknown_keywords(cls: type[T]) -> type[T]:
    """Class decorator: an unknown keyword of the constructor raises `TypeError` and names the nearest valid one.

    Only the constructor changes; copying and pickling, which bypass it, stay as the dataclass made them.
    """
    construct: Callable[..., None] = cls.__init__
    valid = [field.name for field in fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(construct)
    def __init__(self: T, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in valid:
                raise unknown_name_error(cls.__name__, name, valid)
        construct(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[assignment]
    return cls


@dataclass(frozen=True, slots=True)
class ResolvedSampling:
    """Sampling parameters with every value known: what the sampler reads for one sequence."""

    temperature: float = 1.0  # 0 = greedy; never between 0 and GREEDY_BELOW
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    min_tokens: int = 0
    end_token_ids: tuple[int, ...] = ()  # not sampled before min_tokens tokens exist
    logprobs: int | None = None
    logits_processors: tuple[LogitsProcessor, ...] = ()

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on which tokens came before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def follows_output(self) -> bool:
        """Whether the host must know every earlier token before it can say how the next one is chosen."""
        return self.has_penalties or bool(self.logits_processors) or bool(self.min_tokens and self.end_token_ids)

    @property
    def changes_logits(self) -> bool:
        """Whether more is done to the logits than scaling them and cutting off the unlikely."""
        return self.follows_output or bool(self.logit_bias)

    @property
    def has_filters(self) -> bool:
        """Whether some tokens are cut off. A greedy choice survives every cut."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)


@reject_unknown_keywords
@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling and stop parameters of a request, in vLLM's and OpenAI's vocabulary.

    `None` means "not set": `generation_config.json` of the model supplies the value where it has one, else the
    neutral value does (temperature 1, top_p 1, top_k 0 = all, min_p 0, repetition_penalty 1).
    The logits of a step pass: penalties, logit_bias, logits_processors, min_tokens, temperature, top_k, top_p, min_p.
    Raises ValueError, with one sentence, for a value out of range, and TypeError for an unknown keyword.
    """

    temperature: float | None = None  # 0 = greedy
    top_p: float | None = None
    top_k: int | None = None  # 0 or -1 = all
    min_p: float | None = None
    repetition_penalty: float | None = None  # over prompt and output; divides positive logits, multiplies negative ones
    presence_penalty: float = 0.0  # over the output; subtracted once from every token in it
    frequency_penalty: float = 0.0  # over the output; subtracted for every occurrence
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = 64  # None = up to the context's end
    min_tokens: int = 0  # until there are so many, neither EOS nor stop ids are sampled and stop strings do not end
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # top alternatives to report per generated token; 0 = only the sampled one
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    logits_processors: list[LogitsProcessor] | None = None

    def __post_init__(self) -> None:
        """Check every field, and keep copies of the containers: what the user changes later changes nothing here."""
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            object.__setattr__(self, name, check(name, value))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) exceeds max_tokens ({self.max_tokens}): lower the first")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whichever way it was given."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy that shares no container with this one, with some fields changed; they are checked again."""
        for name in changes:
            if name not in _FIELDS:
                raise unknown_name_error("SamplingParams", name, _FIELDS)
        return replace(self, **changes)

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise ValueError if `logit_bias` or `stop_token_ids` names a token outside [0, vocab_size)."""
        for name, ids in (("logit_bias", self.logit_bias or ()), ("stop_token_ids", self.stop_token_ids or ())):
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise ValueError(
                        f"{name} names token {token_id}, which is outside the vocabulary: use ids from 0 to "
                        f"{vocab_size - 1}"
                    )

    def resolve(self, defaults: Mapping[str, Any] | None = None, eos_token_ids: Iterable[int] = ()) -> ResolvedSampling:
        """The values to sample with.

        `defaults`: the content of `generation_config.json`; of it, the five fields whose None means "not set" are
        read, and a value out of range raises ValueError. `eos_token_ids`: the model's, held back by `min_tokens`.
        """
        known: dict[str, Any] = {}
        for name in _FROM_MODEL:
            value = getattr(self, name)
            if value is None and defaults is not None and defaults.get(name) is not None:
                value = _CHECKS[name](f"generation_config.json: {name}", defaults[name])
            if value is not None:
                known[name] = min(value, LARGEST_FLOAT32) if isinstance(value, float) else value
        if known.get("temperature", 1.0) < GREEDY_BELOW:
            known["temperature"] = 0.0
        known["top_k"] = max(known.get("top_k", 0), 0)
        ends = set(self.stop_token_ids or ()) | (set() if self.ignore_eos else set(eos_token_ids))
        return ResolvedSampling(
            **known,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple((self.logit_bias or {}).items()),
            min_tokens=self.min_tokens,
            end_token_ids=tuple(sorted(ends)),
            logprobs=self.logprobs,
            logits_processors=tuple(self.logits_processors or ()),
        )


def child_seed(seed: int, index: int) -> int:
    """The 64-bit seed of a request's completion number `index`; number 0 has the request's own (modulo 2**64)."""
    mask = 2**64 - 1
    if index == 0:
        return seed & mask
    # One step of SplitMix64 (Steele, Lea, Flood 2014): neighbouring indices give unrelated seeds.
    z = (seed + index * 0x9E3779B97F4A7C15) & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


# ------------------------------------------------------------------------------------------------------------- checks
# A check takes a field's name and value and returns the value in its plain type, or raises ValueError.


def _real(accept: Callable[[float], bool], rule: str) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        number = _to_float(value)
        if not math.isfinite(number) or not accept(number):
            raise ValueError(f"{name} must be {rule}, got {value!r}")
        return number

    return check


def _to_float(value: Any) -> float:
    """NaN for what is not a number (NumPy's are) and for integers beyond float's range."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _integer(low: int, high: float, rule: str) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
            raise ValueError(f"{name} must be {rule}, got {value!r}")
        return int(value)

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def _stop(name: str, value: Any) -> str | list[str]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"{name} must be a non-empty string or a list of them, got {value!r}")
    return value if isinstance(value, str) else list(value)


def _token_ids(name: str, value: Any) -> list[int]:
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise ValueError(f"{name} must be a list of token ids, got {value!r}")
    return [_TOKEN_ID(f"every id in {name}", token_id) for token_id in value]


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a dictionary from token id to bias, got {value!r}")
    return {_TOKEN_ID(f"every key of {name}", k): _BIAS(f"{name} of token {k}", v) for k, v in value.items()}


def _processors(name: str, value: Any) -> list[LogitsProcessor]:
    if not isinstance(value, (list, tuple)) or not all(callable(processor) for processor in value):
        signature = "(prompt_ids, output_ids, logits) -> logits"
        raise ValueError(f"{name} must be a list of functions {signature}, got {value!r}")
    return list(value)


_TOKEN_ID = _integer(0, math.inf, "an integer, 0 or more")
_BIAS = _real(lambda x: -100.0 <= x <= 100.0, "a number from -100 to 100")
_PENALTY = _real(lambda x: -2.0 <= x <= 2.0, "a number from -2 to 2")
_NUM_LOGPROBS = _integer(0, MAX_LOGPROBS, f"an integer from 0 to {MAX_LOGPROBS}, or None for no log-probabilities")

_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "temperature": _real(lambda x: x >= 0.0, "a finite number, 0 (greedy) or more"),
    "top_p": _real(lambda x: 0.0 < x <= 1.0, "a number above 0 and up to 1 (= off)"),
    "top_k": _integer(-1, math.inf, "an integer, 1 or more (0 or -1 = off)"),
    "min_p": _real(lambda x: 0.0 <= x <= 1.0, "a number from 0 (= off) to 1"),
    "repetition_penalty": _real(lambda x: x > 0.0, "a finite number above 0 (1 = off)"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "logit_bias": _logit_bias,
    "seed": _integer(-(2**63), 2**64 - 1, "an integer of at most 64 bits"),
    "n": _integer(1, MAX_N, f"an integer from 1 to {MAX_N}"),
    "max_tokens": _integer(1, math.inf, "an integer, 1 or more, or None for the rest of the context"),
    "min_tokens": _integer(0, math.inf, "an integer, 0 or more"),
    "stop": _stop,
    "stop_token_ids": _token_ids,
    "include_stop_str_in_output": _flag,
    "ignore_eos": _flag,
    "logprobs": _NUM_LOGPROBS,
    "prompt_logprobs": _NUM_LOGPROBS,
    "skip_special_tokens": _flag,
    "logits_processors": _processors,
}
_FIELDS = [field.name for field in fields(SamplingParams)]
_OPTIONAL = {field.name for field in fields(SamplingParams) if "None" in str(field.type)}
_FROM_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
