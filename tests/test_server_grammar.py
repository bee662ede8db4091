"""`response_format`: whatever the model would rather say, the answer is JSON of the shape that was asked for."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest
from openai import OpenAI
from pydantic import BaseModel, Field
from server_lives import Live, live_smollm2

from nanovllm.server.app import INLINE_BODY_BYTES
from nanovllm.server.grammar import FIELD

CHAT = "/v1/chat/completions"


class City(BaseModel):
    """What the client asks for."""

    name: str = Field(max_length=12)
    population: int = Field(ge=0, le=99_999_999)
    size: Literal["small", "large"]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live_smollm2() as server:
        yield server


def ask(server: Live, schema: Any, **fields: Any) -> list[str]:
    """The texts of all choices for a question that invites prose."""
    form = {"type": "json_object"} if schema is None else {"type": "json_schema", "json_schema": {"schema": schema}}
    body = {"messages": [{"role": "user", "content": "Tell me about Paris."}], "max_tokens": 60, "temperature": 0}
    answer = server.post(CHAT, body | {"response_format": form} | fields)
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    return [choice["message"]["content"] for choice in answer["choices"]]


def test_the_official_client_parses_its_class(server: Live) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    answer = client.chat.completions.parse(
        model="smollm2", messages=[{"role": "user", "content": "Describe Paris as JSON."}], response_format=City,
        temperature=0, max_tokens=80,
    )  # fmt: skip
    city = answer.choices[0].message.parsed
    assert isinstance(city, City) and answer.choices[0].finish_reason == "stop"


def test_choices_take_turns(server: Live) -> None:
    """Five hot samples of one request share a processor, and each of them is a member of the list."""
    words = ["red", "green", "blue", "yellow and green", "yellow and red"]
    texts = ask(server, {"enum": words}, n=5, temperature=5.0, seed=1)
    assert {json.loads(text) for text in texts} <= set(words) and len(set(texts)) > 1


def test_a_stream_and_the_older_endpoint(server: Live) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 3}
    form = {"type": "json_schema", "json_schema": {"name": "three", "schema": schema, "strict": True}}
    body = {"prompt": "Three numbers:", "temperature": 0, "max_tokens": 40, "response_format": form}
    whole = server.post("/v1/completions", body)["choices"][0]["text"]
    assert [type(number) for number in json.loads(whole)] == [int] * 3
    _, _, content = server.ask("POST", "/v1/completions", body | {"stream": True})
    events = [json.loads(event[6:]) for event in content.decode().split("\n\n")[:-2]]
    assert "".join(event["choices"][0]["text"] for event in events) == whole


def test_any_object(server: Live) -> None:
    body = {"messages": [{"role": "user", "content": 'Repeat: {"a": 1}'}], "temperature": 0, "max_tokens": 60}
    answer = server.post(CHAT, body | {"response_format": {"type": "json_object"}})
    text = answer["choices"][0]["message"]["content"]
    assert text.startswith("{")
    if answer["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(text), dict)


def test_nobody_waits_for_a_schema_but_schemas(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many that take for ever as threads would be lent to them."""
    done = threading.Event()
    monkeypatch.setattr(server.service.grammars, "read", lambda body, engine: done.wait(60) and body.take(FIELD) and [])
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    with ThreadPoolExecutor(41) as pool:
        held = [pool.submit(server.post, CHAT, body | {FIELD: {"type": "json_object"}}) for _ in range(40)]
        time.sleep(0.5)
        try:
            asked = pool.submit(server.post, "/tokenize", {"prompt": "a" * INLINE_BODY_BYTES})
            assert asked.result(timeout=20)["count"]
            assert not any(answer.done() for answer in held)
        finally:
            done.set()
        assert all(answer.result()["choices"] for answer in held)


@pytest.mark.parametrize(
    ("form", "fields", "param"),
    [
        ({"type": "xml"}, {}, "response_format.type"),
        ({"type": "json_schema"}, {}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": 5}}, {}, "response_format.schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "colour"}}}, {}, "response_format"),
        ({"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}}, {}, "response_format"),
        ({"type": "json_schema", "json_schema": {"schema": {"not": {"type": "string"}}}}, {}, "response_format"),
        ({"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}, {}, "response_format"),
        (
            {"type": "json_schema", "json_schema": {"schema": {"x-guidance": {"whitespace_pattern": "z+"}}}},
            {},
            "response_format.json_schema.schema",
        ),
        ({"type": "json_object", "indent": 2}, {}, "response_format.indent"),
        ("json", {}, "response_format"),
        ({"type": "json_object"}, {"ignore_eos": True}, "ignore_eos"),
        ({"type": "json_object"}, {"min_tokens": 5}, "min_tokens"),
    ],
)
def test_refusals(server: Live, form: Any, fields: dict[str, Any], param: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "response_format": form}
    assert server.refusal(CHAT, body | fields)["param"] == param
