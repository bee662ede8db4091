"""SamplingParams: every bad value has its sentence, every good one survives, and None means the model's own default."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import re
from typing import Any

import numpy as np
import pytest

from nanovllm.sampling_params import MAX_LOGPROBS, ResolvedSampling, SamplingParams, child_seed

NAN, INF = float("nan"), float("inf")
TEMPERATURE = "temperature must be a finite number, 0 (greedy) or more"
TOP_P = "top_p must be a number above 0 and up to 1 (= off)"
TOP_K = "top_k must be an integer, 1 or more (0 or -1 = off)"
MIN_P = "min_p must be a number from 0 (= off) to 1"
REPETITION = "repetition_penalty must be a finite number above 0 (1 = off)"
MAX_TOKENS = "max_tokens must be an integer, 1 or more, or None for the rest of the context"
STOP = "stop must be a non-empty string or a list of them"
BIAS_KEY = "every key of logit_bias must be an integer, 0 or more"
BIAS = "logit_bias of token 5 must be a number from -100 to 100"
PROCESSORS = "logits_processors must be a list of functions (prompt_ids, output_ids, logits) -> logits"

BAD: list[tuple[str, list[Any], str]] = [
    ("temperature", [-0.1, NAN, INF, -INF, "1", True, [1.0], 10**400], TEMPERATURE),
    ("top_p", [0, 0.0, -0.5, 1.0001, NAN, "0.9", False], TOP_P),
    ("top_k", [-2, 1.0, 2.5, "5", True, NAN], TOP_K),
    ("min_p", [-0.01, 1.01, NAN, "0", True], MIN_P),
    ("repetition_penalty", [0, -1.0, NAN, INF, "1", True], REPETITION),
    ("seed", [1.0, "1", True, 2**64, -(2**63) - 1], "seed must be an integer of at most 64 bits"),
    ("n", [0, -1, 1.0, True, None, "2", 10**9], "n must be an integer from 1 to 1024"),
    ("max_tokens", [0, -5, 2.0, True, "64"], MAX_TOKENS),
    ("min_tokens", [-1, 1.5, None, True], "min_tokens must be an integer, 0 or more"),
    ("stop", ["", ["a", ""], ["a", 3], 7, {"a": 1}], STOP),
    ("stop_token_ids", [3, "12"], "stop_token_ids must be a list of token ids"),
    ("include_stop_str_in_output", [1, None, "yes"], "include_stop_str_in_output must be True or False"),
    ("ignore_eos", [0, None], "ignore_eos must be True or False"),
    ("skip_special_tokens", [1, None], "skip_special_tokens must be True or False"),
    ("logit_bias", [[(1, 2.0)], "x"], "logit_bias must be a dictionary from token id to bias"),
    ("logits_processors", [len, [3], "f"], PROCESSORS),
    *(
        (name, [-2.1, 2.1, NAN, INF, None, "0", True], f"{name} must be a number from -2 to 2")
        for name in ("presence_penalty", "frequency_penalty")
    ),
    *(
        (name, [-1, MAX_LOGPROBS + 1, 1.0, True], f"{name} must be an integer from 0 to {MAX_LOGPROBS}")
        for name in ("logprobs", "prompt_logprobs")
    ),
]


@pytest.mark.parametrize(("name", "value", "sentence"), [(n, v, s) for n, values, s in BAD for v in values])
def test_bad_value_gets_its_sentence(name: str, value: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(sentence)) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value).endswith(f", got {value!r}")
    assert "\n" not in str(caught.value)


def test_every_field_has_a_bad_value() -> None:
    assert {name for name, _, _ in BAD} == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    ("bias", "sentence"),
    [
        ({"5": 1.0}, BIAS_KEY),
        ({5.0: 1.0}, BIAS_KEY),
        ({True: 1.0}, BIAS_KEY),
        ({-1: 1.0}, BIAS_KEY),
        ({5: 100.5}, BIAS),
        ({5: NAN}, BIAS),
        ({5: -INF}, BIAS),
        ({5: "1"}, BIAS),
    ],
)
def test_bad_entries_of_logit_bias(bias: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        SamplingParams(logit_bias=bias)


@pytest.mark.parametrize("ids", [[1, -2], [1.0], ["a"], [True]])
def test_bad_entries_of_stop_token_ids(ids: Any) -> None:
    with pytest.raises(ValueError, match="^every id in stop_token_ids must be an integer, 0 or more, got"):
        SamplingParams(stop_token_ids=ids)


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(ValueError, match=r"^min_tokens \(9\) exceeds max_tokens \(8\): lower the first$"):
        SamplingParams(min_tokens=9, max_tokens=8)
    assert SamplingParams(min_tokens=9, max_tokens=None).min_tokens == 9


@pytest.mark.parametrize(
    ("keyword", "nearest"),
    [
        ("temprature", "temperature"),
        ("topp", "top_p"),
        ("max_token", "max_tokens"),
        ("stop_tokens_ids", "stop_token_ids"),
    ],
)
def test_unknown_keyword_names_the_nearest(keyword: str, nearest: str) -> None:
    with pytest.raises(TypeError, match=f"^SamplingParams has no parameter '{keyword}'; did you mean '{nearest}'"):
        SamplingParams(**{keyword: 1})
    with pytest.raises(TypeError, match=f"did you mean '{nearest}'"):
        SamplingParams().clone(**{keyword: 1})


def test_unknown_keyword_without_a_near_one_lists_all() -> None:
    with pytest.raises(TypeError, match="valid names: .*frequency_penalty, ignore_eos"):
        SamplingParams(zzz=1)  # type: ignore[call-arg]


def test_it_is_still_a_dataclass() -> None:
    params = SamplingParams(temperature=0.5, stop=["a"], logit_bias={3: 1}, stop_token_ids=[7], seed=2**64 - 1)
    for twin in (copy.copy(params), copy.deepcopy(params), pickle.loads(pickle.dumps(params)), params.clone()):
        assert twin == params
        assert twin is not params
    assert dataclasses.replace(params, n=3).n == 3
    assert params != params.clone(seed=1)
    assert repr(params).startswith("SamplingParams(temperature=0.5, ")
    assert list(inspect.signature(SamplingParams).parameters)[:2] == ["temperature", "top_p"]
    assert SamplingParams(0.25, 0.5) == SamplingParams(temperature=0.25, top_p=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


def test_values_are_checked_again_by_clone_and_replace() -> None:
    for change in (SamplingParams().clone, lambda **kw: dataclasses.replace(SamplingParams(), **kw)):
        with pytest.raises(ValueError, match="^top_p must be"):
            change(top_p=3)


def test_containers_are_copied() -> None:
    stop, ids, bias, processors = ["a"], [1], {1: 2.0}, [len]
    params = SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=bias, logits_processors=processors)  # type: ignore[arg-type]
    twin = params.clone()
    stop.append("b"), ids.append(2), bias.update({9: 1.0}), processors.append(max)
    assert params == twin
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (["a"], [1], {1: 2.0})
    assert twin.stop is not params.stop
    assert twin.logit_bias is not params.logit_bias


def test_numbers_become_plain() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(3),
        top_p=1,
        stop_token_ids=(np.int32(4),),
        logit_bias={np.int64(2): 1},
    )
    values = (params.temperature, params.top_k, params.top_p, params.stop_token_ids, params.logit_bias)
    assert values == (0.5, 3, 1.0, [4], {2: 1.0})
    assert [type(v) for v in values[:3]] == [float, int, float]
    assert type(params.stop_token_ids[0]) is int
    assert [(type(k), type(v)) for k, v in params.logit_bias.items()] == [(int, float)]


@pytest.mark.parametrize(("stop", "strings"), [(None, ()), ("ab", ("ab",)), (["a", "b"], ("a", "b")), ([], ())])
def test_stop_strings(stop: Any, strings: tuple[str, ...]) -> None:
    assert SamplingParams(stop=stop).stop_strings == strings


def test_check_token_ids() -> None:
    params = SamplingParams(stop_token_ids=[0, 99], logit_bias={99: 1.0})
    params.check_token_ids(100)
    with pytest.raises(
        ValueError, match="^logit_bias names token 99, which is outside the vocabulary: use ids from 0 to 98"
    ):
        params.check_token_ids(99)
    with pytest.raises(ValueError, match="^stop_token_ids names token 99"):
        SamplingParams(stop_token_ids=[99]).check_token_ids(99)


def test_resolve_to_neutral_values() -> None:
    assert SamplingParams().resolve() == ResolvedSampling()
    assert SamplingParams().resolve({"do_sample": True, "max_length": 20, "top_p": None}) == ResolvedSampling()
    neutral = ResolvedSampling()
    assert not (neutral.is_greedy or neutral.has_penalties or neutral.has_filters)


def test_resolve_takes_the_models_defaults_for_what_is_not_set() -> None:
    defaults = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.1}
    resolved = SamplingParams().resolve(defaults)
    assert {name: getattr(resolved, name) for name in defaults} == defaults
    chosen = SamplingParams(temperature=1, top_k=-1, top_p=0.5, min_p=0, repetition_penalty=1).resolve(defaults)
    assert chosen == ResolvedSampling(temperature=1.0, top_k=0, top_p=0.5)


def test_resolve_refuses_bad_defaults() -> None:
    with pytest.raises(ValueError, match="^generation_config.json: top_p must be a number .*, got 1.5$"):
        SamplingParams().resolve({"top_p": 1.5})
    assert SamplingParams(top_p=0.5).resolve({"top_p": 1.5}).top_p == 0.5


@pytest.mark.parametrize(("given", "resolved"), [(0.0, 0.0), (9e-6, 0.0), (1e-5, 1e-5), (2.0, 2.0)])
def test_tiny_temperatures_are_greedy(given: float, resolved: float) -> None:
    params = SamplingParams(temperature=given, top_k=3).resolve()
    assert params.temperature == resolved
    assert params.is_greedy == (resolved == 0.0)
    assert params.has_filters == (resolved != 0.0)  # a greedy choice needs no cut


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty"])
def test_numbers_beyond_float32_do_not_overflow(name: str) -> None:
    value = getattr(SamplingParams(**{name: 1e308}).resolve(), name)
    assert value == np.finfo(np.float32).max


def test_resolve_end_tokens_and_the_rest() -> None:
    params = SamplingParams(
        stop_token_ids=[7, 3],
        min_tokens=2,
        logit_bias={4: -1},
        logprobs=0,
        presence_penalty=1,
        logits_processors=[len],  # type: ignore[list-item]
    )
    resolved = params.resolve(eos_token_ids=[2, 3])
    assert resolved.end_token_ids == (2, 3, 7)
    assert resolved.logit_bias == ((4, -1.0),)
    assert (resolved.min_tokens, resolved.logprobs, resolved.presence_penalty) == (2, 0, 1.0)
    assert resolved.logits_processors == (len,)
    assert resolved.has_penalties
    assert params.clone(ignore_eos=True).resolve(eos_token_ids=[2, 3]).end_token_ids == (3, 7)


def test_child_seeds() -> None:
    assert child_seed(5, 0) == 5
    assert child_seed(-1, 0) == 2**64 - 1
    # The first outputs of SplitMix64 seeded with 1234567, from its reference implementation.
    assert [child_seed(1234567, i) for i in (1, 2)] == [6457827717110365317, 3203168211198807973]
    seeds = {child_seed(seed, i) for seed in range(-20, 20) for i in range(50)}
    assert len(seeds) == 40 * 50
    assert all(0 <= seed < 2**64 for seed in seeds)
