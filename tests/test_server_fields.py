"""Every field of a request has an effect or is refused by name, and refusals are OpenAI's error objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from server_lives import Live, live_smollm2

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXT = "The three primary colours are"
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live_smollm2() as server:
        yield server


def text(server: Live, **fields: Any) -> str:
    body = {"prompt": TEXT, "temperature": 0, "max_tokens": 10} | fields
    return server.post(COMPLETIONS, body)["choices"][0]["text"]


EFFECTS: dict[str, dict[str, Any]] = {  # what each field does to the greedy or the seeded text
    "temperature": {"temperature": 2.0, "seed": 1},
    "top_p": {"temperature": 2.0, "seed": 1, "top_p": 0.01},
    "top_k": {"temperature": 2.0, "seed": 1, "top_k": 1},
    "min_p": {"temperature": 2.0, "seed": 1, "min_p": 1.0},
    "repetition_penalty": {"repetition_penalty": 2.0},
    "presence_penalty": {"presence_penalty": 2.0},
    "frequency_penalty": {"frequency_penalty": 2.0},
    "logit_bias": {"logit_bias": {"28": 100}},
    "stop": {"stop": [" red"]},
    "stop_token_ids": {"stop_token_ids": [28]},
    "max_tokens": {"max_tokens": 2},
    "echo": {"echo": True},
}


@pytest.mark.parametrize("field", ["repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "stop",
                                   "stop_token_ids", "max_tokens", "echo", "temperature"])  # fmt: skip
def test_a_field_changes_the_text(server: Live, field: str) -> None:
    longer = {"max_tokens": 30} if "penalty" in field else {}
    assert text(server, **longer, **EFFECTS[field]) != text(server, **longer)


@pytest.mark.parametrize("field", ["top_p", "top_k", "min_p"])
def test_a_cut_makes_a_hot_sample_greedy(server: Live, field: str) -> None:
    assert text(server, **EFFECTS[field]) == text(server) != text(server, **EFFECTS["temperature"])


def test_ends(server: Live) -> None:
    def choice(**fields: Any) -> dict[str, Any]:
        body = {"prompt": TEXT, "temperature": 0, "max_tokens": 10} | fields
        return server.post(COMPLETIONS, body)["choices"][0]

    whole = choice()
    assert (whole["finish_reason"], whole["stop_reason"]) == ("length", None)
    word = whole["text"].split()[1]
    ended = choice(stop=word)
    assert ended["text"] == whole["text"].partition(word)[0]
    assert (ended["finish_reason"], ended["stop_reason"]) == ("stop", word)
    assert choice(stop=word, include_stop_str_in_output=True)["text"] == ended["text"] + word
    assert choice(stop=word, min_tokens=10)["text"] == whole["text"]
    ids = server.post("/tokenize", {"prompt": whole["text"]})["tokens"]
    assert choice(stop_token_ids=[ids[2]])["stop_reason"] == ids[2]
    messages = [{"role": "user", "content": "Say hi."}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 60, "ignore_eos": True}
    answer = server.post(CHAT, body | {"skip_special_tokens": False})
    assert answer["usage"]["completion_tokens"] == 60 and "<|im_end|>" in answer["choices"][0]["message"]["content"]
    assert "<|im_end|>" not in server.post(CHAT, body)["choices"][0]["message"]["content"]


def test_nulls_neutral_values_and_whole_floats(server: Live) -> None:
    names = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
             "logit_bias", "seed", "n", "max_tokens", "max_completion_tokens", "min_tokens", "stop", "stop_token_ids",
             "ignore_eos", "logprobs", "top_logprobs", "prompt_logprobs", "stream", "stream_options", "tools", "model",
             "tool_choice", "response_format", "user", "chat_template_kwargs", "unheard_of"]  # fmt: skip
    plain = {"messages": HI, "max_tokens": 3, "temperature": 0}
    expected = server.post(CHAT, plain)["choices"]
    nulls = dict.fromkeys(names) | plain
    neutral = {
        "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "tools": [], "tool_choice": "none",
        "response_format": {"type": "text"}, "parallel_tool_calls": True, "modalities": ["text"], "n": 1.0, "top_k": 0,
        "stop": [], "logit_bias": {}, "seed": 1.0, "max_tokens": 3.0, "max_completion_tokens": 3.0, "stream": False,
        "chat_template_kwargs": {}, "top_p": 1, "logprobs": False, "best_of": 1, "top_logprobs": 0,
        "stream_options": {"continuous_usage_stats": False},
    }  # fmt: skip
    for body in (nulls, plain | neutral):
        assert server.post(CHAT, body)["choices"] == expected
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert server.post(CHAT, plain | {"tools": [tool], "tool_choice": "none"})["choices"] == expected


REFUSED: list[tuple[str, dict[str, Any], str]] = [  # path, fields, the field to blame
    (CHAT, {"temprature": 0.5}, "temprature"),
    (CHAT, {"temperature": -1}, "temperature"),
    (CHAT, {"temperature": "0.7"}, "temperature"),
    (CHAT, {"temperature": True}, "temperature"),
    (CHAT, {"top_p": 0}, "top_p"),
    (CHAT, {"top_k": 1.5}, "top_k"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": 100000}, "n"),
    (CHAT, {"n": 10**300}, "n"),
    (CHAT, {"seed": 2**70}, "seed"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_completion_tokens": -1}, "max_completion_tokens"),
    (CHAT, {"max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens"),
    (CHAT, {"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
    (CHAT, {"presence_penalty": 3}, "presence_penalty"),
    (CHAT, {"stop": ""}, "stop"),
    (CHAT, {"stop": [1]}, "stop"),
    (CHAT, {"stop": ["a"] * 65}, "stop"),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"999999": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"1": 101}}, "logit_bias"),
    (CHAT, {"logit_bias": [1]}, "logit_bias"),
    (CHAT, {"stop_token_ids": [10**6]}, "stop_token_ids"),
    (CHAT, {"logprobs": 5}, "logprobs"),
    (CHAT, {"top_logprobs": 5}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 101}, "top_logprobs"),
    (CHAT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (CHAT, {"stream": "yes"}, "stream"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"stream": True, "stream_options": {"continuous_usage_stats": True}},
     "stream_options.continuous_usage_stats"),
    (CHAT, {"stream": True, "stream_options": True}, "stream_options"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions"),
    (CHAT, {"guided_json": {"type": "object"}}, "guided_json"),
    (CHAT, {"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort"),
    (CHAT, {"chat_template": "{{ x }}"}, "chat_template"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": [1]}, "chat_template_kwargs"),
    (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    (CHAT, {"echo": True}, "echo"),
    (CHAT, {"prompt": "x"}, "prompt"),
    (CHAT, {"model": 5}, "model"),
    (CHAT, {"logits_processors": ["os.system"]}, "logits_processors"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": None}, "messages"),
    (CHAT, {"messages": "Hi"}, "messages"),
    (CHAT, {"messages": ["Hi"]}, "messages[0]"),
    (CHAT, {"messages": [{"content": "Hi"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": ["user"], "content": "Hi"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    (CHAT, {"messages": [*HI, {"role": "user", "content": 5}]}, "messages[1].content"),
    (CHAT, {"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": ["Hi"]}]}, "messages[0].content[0]"),
    (CHAT, {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[1]"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "colour": "red"}]}, "messages[0].colour"),
    (CHAT, {"messages": [{"role": "tool", "content": "5", "tool_call_id": "x"}]}, "messages[0].tool_call_id"),
    (CHAT, {"messages": [{"role": "tool", "content": "5"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}]},
     "messages[0].tool_calls"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": ["a", [1]] + [5]}, "prompt[2]"),
    (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
    (COMPLETIONS, {"prompt": [True]}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": [10**30]}, "prompt"),
    (COMPLETIONS, {"prompt": {"text": "a"}}, "prompt"),
    (COMPLETIONS, {"prompt": "\udc00"}, "prompt"),
    (COMPLETIONS, {"prompt": ["a"] * 600, "n": 2}, "prompt"),
    (COMPLETIONS, {"prompt": ["a"] * 2000}, "prompt"),
    (COMPLETIONS, {"best_of": 2}, "best_of"),
    (COMPLETIONS, {"suffix": "x"}, "suffix"),
    (COMPLETIONS, {"logprobs": 101}, "logprobs"),
    (COMPLETIONS, {"logprobs": True}, "logprobs"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"messages": HI}, "messages"),
    (COMPLETIONS, {"echo": True, "logprobs": 1, "prompt_logprobs": 2}, "echo"),
    ("/tokenize", {}, "messages"),
    ("/tokenize", {"prompt": "a", "messages": HI}, "messages"),
    ("/detokenize", {"tokens": [10**30]}, "tokens"),
    ("/detokenize", {"tokens": "a"}, "tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "param"), REFUSED, ids=str)
def test_a_refusal_names_the_field(server: Live, path: str, fields: dict[str, Any], param: str) -> None:
    base: dict[str, Any] = {CHAT: {"messages": HI}, COMPLETIONS: {"prompt": "Hi"}}.get(path, {})
    error = server.refusal(path, base | fields)
    assert error["param"] == param, error
    assert len(error["message"]) < 1000


def test_a_number_beyond_floats(server: Live) -> None:
    assert server.refusal(CHAT, b'{"messages": [{"role": "user", "content": "a"}], "top_p": 1e999}')["param"] == "top_p"


def test_a_misspelt_field_is_told_its_name(server: Live) -> None:
    assert "did you mean 'temperature'?" in server.refusal(CHAT, {"messages": HI, "temprature": 1})["message"]
    assert "temperature must be a finite number" in server.refusal(CHAT, {"messages": HI, "temperature": -1})["message"]


BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[1]",
    "not UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "nested": b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "huge number": b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("name", BODIES)
def test_what_is_no_request(server: Live, name: str) -> None:
    for path in (CHAT, COMPLETIONS, "/tokenize", "/detokenize"):
        assert server.refusal(path, BODIES[name])["param"] is None


@pytest.mark.parametrize("field", ["temperature", "stop", "logit_bias", "unheard_of"])
def test_nesting_that_can_be_read_but_not_shown(server: Live, field: str) -> None:
    for depth in range(900, 1000):
        value = "[" * depth + "]" * depth
        server.refusal(COMPLETIONS, f'{{"prompt": "a", "{field}": {value}}}'.encode())


def test_transport(server: Live) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    assert server.ask("POST", COMPLETIONS, json.dumps(body).encode(), content_type="text/plain")[0] == 200
    assert server.ask("POST", COMPLETIONS + "/", body)[0] == 200
    assert server.ask("HEAD", "/health")[::2] == (200, b"")
    for method, path, status in (("GET", CHAT, 405), ("POST", "/health", 405), ("GET", "/v1/nothing", 404)):
        got, headers, content = server.ask(method, path)
        assert got == status and json.loads(content)["error"]["message"] and headers["content-type"].endswith("json")
    status, _, content = server.ask("POST", COMPLETIONS, b"\x1f\x8b", content_encoding="gzip")
    assert status == 415 and "gzip" in json.loads(content)["error"]["message"]
    assert server.refusal(COMPLETIONS, b" " * (17 << 20), 413)
    assert json.loads(server.ask("GET", "/version")[2]).keys() == {"version"}


def test_browsers(server: Live) -> None:
    asking = dict(origin="http://page.example", access_control_request_method="POST",
                  access_control_request_headers="authorization,content-type")  # fmt: skip
    status, headers, _ = server.ask("OPTIONS", CHAT, **asking)
    assert (status, headers["access-control-allow-origin"]) == (200, "*")
    assert "authorization" in headers["access-control-allow-headers"]
    _, headers, _ = server.ask("POST", CHAT, {}, origin="http://page.example")  # a refusal must be readable too
    assert headers["access-control-allow-origin"] == "*"
