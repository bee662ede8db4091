"""The server as the official client sees it: what comes over HTTP is what the engine says."""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from server_lives import Live, live_smollm2

from nanovllm import SamplingParams
from nanovllm.engine.request import Request

PARIS = [{"role": "user", "content": "What is the capital of France?"}]
TEXT = "The three primary colours are"


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live_smollm2(names=["tiny", "alias"]) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Live) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def engine(server: Live, prompt: Any, **params: Any) -> Request:
    """The same request without HTTP; run on the engine's thread, by an event loop of its own."""
    import asyncio

    request = server.llm.engine.make_request(prompt, SamplingParams(**params))

    async def run() -> None:
        async for _ in server.llm.follow([request], only_end=True):
            pass

    asyncio.run(run())
    return request


def test_chat_equals_the_engine(server: Live, client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=PARIS, temperature=0)
    expected = engine(server, server.llm.engine.render_chat(PARIS), temperature=0, max_tokens=None)
    (choice,) = answer.choices
    assert choice.message.content == expected.output().outputs[0].text and "Paris" in choice.message.content
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "stop", 0)
    assert (answer.object, answer.model) == ("chat.completion", "tiny") and answer.id.startswith("chatcmpl-")
    made = len(expected.completions[0].seq.output_token_ids)
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids) == 37
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (made, 37 + made)


def test_a_stream_says_who_what_why_and_how_much(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="alias", messages=PARIS, temperature=0, logprobs=True, top_logprobs=2)
    chunks = list(
        client.chat.completions.create(
            model="alias", messages=PARIS, temperature=0, logprobs=True, top_logprobs=2, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert {(c.id, c.created, c.model, c.object) for c in chunks} == {
        (chunks[0].id, chunks[0].created, "alias", "chat.completion.chunk")
    }
    first, *middle, last, usage = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(c.choices[0].delta.content for c in middle) == whole.choices[0].message.content
    scores = [entry for c in middle for entry in c.choices[0].logprobs.content]
    assert scores == whole.choices[0].logprobs.content and len(scores) == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert last.choices[0].delta.content is None
    assert usage.choices == [] and usage.usage.completion_tokens == whole.usage.completion_tokens
    assert all(c.usage is None for c in chunks[:-1])


def test_the_bytes_of_a_stream(server: Live) -> None:
    body = {"prompt": TEXT, "max_tokens": 3, "temperature": 0, "stream": True}
    status, headers, content = server.ask("POST", "/v1/completions", body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    events = content.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    chunks = [json.loads(event[6:]) for event in events[:-2]]
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[-1]["choices"][0] == {
        "index": 0, "text": "", "logprobs": None, "finish_reason": "length", "stop_reason": None,
    }  # fmt: skip


def test_chat_logprobs_equal_the_engine(server: Live, client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=PARIS, temperature=0, max_completion_tokens=5, logprobs=True, top_logprobs=3
    )
    prompt = server.llm.engine.render_chat(PARIS)
    output = engine(server, prompt, temperature=0, max_tokens=5, logprobs=3).output().outputs[0]
    said = answer.choices[0].logprobs.content
    assert len(said) == len(output.token_ids) == 5
    for entry, token_id, expected in zip(said, output.token_ids, output.logprobs, strict=True):
        assert entry.logprob == pytest.approx(expected[token_id].logprob, abs=1e-4)
        ranked = sorted(expected.values(), key=lambda p: p.rank)[:3]
        assert [top.token for top in entry.top_logprobs] == [p.decoded_token for p in ranked]
        assert bytes(entry.bytes).decode() == entry.token == expected[token_id].decoded_token
    assert client.chat.completions.create(
        model="tiny", messages=PARIS, max_tokens=1, logprobs=True
    ).choices[0].logprobs.content[0].top_logprobs == []  # fmt: skip


def test_bytes_of_tokens_make_up_characters(client: OpenAI) -> None:
    """A token may be a third of a character; its bytes are exact where its text cannot be."""
    ids = "日本"
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": ids}],
        logprobs=True, max_tokens=12, temperature=0, logit_bias={str(i): 50 for i in (230, 245, 98, 106)},
        extra_body={"continue_final_message": True, "ignore_eos": True},
    )  # fmt: skip
    choice = answer.choices[0]
    data = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
    assert data.decode("utf-8", "replace") == choice.message.content


def test_completions_equal_the_engine(server: Live, client: OpenAI) -> None:
    ids = server.llm.engine.require_tokenizer().encode(TEXT)
    expected = engine(server, TEXT, temperature=0, max_tokens=16).output().outputs[0].text  # 16: OpenAI's default
    for prompt, count in ((TEXT, 1), (ids, 1), ([TEXT, TEXT], 2), ([ids, ids], 2)):
        answer = client.completions.create(model="tiny", prompt=prompt, temperature=0)
        assert [choice.text for choice in answer.choices] == [expected] * count
        assert [choice.index for choice in answer.choices] == list(range(count))
        assert answer.usage.prompt_tokens == count * len(ids) and answer.usage.completion_tokens == 16 * count


def test_n_choices_differ_and_seeds_repeat(client: OpenAI) -> None:
    def texts(**options: Any) -> list[str]:
        answer = client.completions.create(
            model="tiny", prompt=[TEXT, "Once"], n=3, seed=5, temperature=1.0, max_tokens=8, **options
        )
        if not options:
            return [choice.text for choice in answer.choices]
        said = [""] * 6
        for chunk in answer:
            for choice in chunk.choices:
                said[choice.index] += choice.text
        return said

    first = texts()
    assert len(set(first)) == 6 and texts() == first == texts(stream=True)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_scores_the_prompt(server: Live, stream: bool) -> None:
    """What evaluation harnesses ask: the log-probability of every prompt token, and perhaps nothing generated."""
    ids = server.llm.engine.require_tokenizer().encode(TEXT)
    expected = engine(server, TEXT, temperature=0, max_tokens=2, logprobs=1, prompt_logprobs=1)
    scores = [entry and entry[i].logprob for i, entry in zip(ids, expected.prompt_logprobs, strict=True)]
    output = expected.output().outputs[0]
    scores += [entry[i].logprob for i, entry in zip(output.token_ids, output.logprobs, strict=True)]
    for max_tokens in (0, 2):
        body = {"prompt": TEXT, "echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0}
        if stream:
            _, _, content = server.ask("POST", "/v1/completions", body | {"stream": True})
            chunks = [json.loads(e[6:]) for e in content.decode().split("\n\n")[:-2]]
            choices = [chunk["choices"][0] for chunk in chunks]
            text = "".join(choice["text"] for choice in choices)
            parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
            logprobs = {name: [x for part in parts for x in part[name]] for name in parts[0]}
        else:
            answer = server.post("/v1/completions", body)
            text, logprobs = answer["choices"][0]["text"], answer["choices"][0]["logprobs"]
            assert answer["usage"]["completion_tokens"] == max_tokens and "prompt_logprobs" not in answer["choices"][0]
        assert text.startswith(TEXT) and (text == TEXT) == (max_tokens == 0)
        got = logprobs["token_logprobs"]
        assert len(got) == len(ids) + max_tokens and got[0] is None and logprobs["top_logprobs"][0] is None
        for a, b in zip(got[1:], scores[1:], strict=False):
            assert math.isclose(a, b, abs_tol=1e-4)
        assert "".join(logprobs["tokens"]) == text
        assert [text[o:].startswith(t) for o, t in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)]
        for token, score, best in zip(logprobs["tokens"][1:], got[1:], logprobs["top_logprobs"][1:], strict=True):
            assert best[token] == score and 1 <= len(best) <= 2


def test_prompt_logprobs_in_vllms_form(server: Live) -> None:
    expected = engine(server, TEXT, temperature=0, max_tokens=1, prompt_logprobs=2).prompt_logprobs
    choice = server.post("/v1/completions", {"prompt": TEXT, "max_tokens": 1, "prompt_logprobs": 2})["choices"][0]
    assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == len(expected)
    for got, entry in zip(choice["prompt_logprobs"][1:], expected[1:], strict=True):
        assert {int(i): p["rank"] for i, p in got.items()} == {i: p.rank for i, p in entry.items()}
    answer = server.post("/v1/chat/completions", {"messages": PARIS, "max_tokens": 1, "prompt_logprobs": 0})
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


def test_a_prefill_is_continued(server: Live, client: OpenAI) -> None:
    messages = [*PARIS, {"role": "assistant", "content": "The capital of France is "}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    ids = server.post("/tokenize", body)["tokens"]
    text = server.post("/detokenize", {"tokens": ids})["prompt"]
    assert text.endswith("<|im_start|>assistant\nThe capital of France is ")
    answer = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=3, extra_body={"continue_final_message": True}
    )
    assert answer.usage.prompt_tokens == len(ids)


def test_parts_and_roles_make_the_same_prompt(server: Live) -> None:
    def tokens(messages: Any, **options: Any) -> list[int]:
        return server.post("/tokenize", {"messages": messages} | options)["tokens"]

    text = "Be brief.\nHi"
    parts = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Hi", "cache_control": {"type": "x"}}]
    assert tokens([{"role": "user", "content": parts}]) == tokens([{"role": "user", "content": text}])
    said = {"role": "assistant", "content": "a", "tool_calls": None, "refusal": None, "annotations": []}
    assert tokens([*PARIS, said, *PARIS]) == tokens([*PARIS, {"role": "assistant", "content": "a"}, *PARIS])
    system = [{"role": "system", "content": "Rhyme."}]
    assert tokens([{"role": "developer", "content": "Rhyme."}, *PARIS]) == tokens(system + PARIS)
    assert tokens(PARIS + system)[-20:] != tokens(system + PARIS)[-20:]  # late system messages stay where they are
    expected = server.llm.engine.render_chat(PARIS, False)["prompt_token_ids"]
    assert tokens(PARIS, add_generation_prompt=False) == expected


def test_tokenize_and_back(server: Live) -> None:
    tokenizer = server.llm.engine.require_tokenizer()
    answer = server.post("/tokenize", {"model": "tiny", "prompt": "Hello 日本", "return_token_strs": True})
    assert answer["tokens"] == tokenizer.encode("Hello 日本") and answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 512
    assert answer["token_strs"] == [tokenizer.id_to_token(i) for i in answer["tokens"]]
    assert server.post("/detokenize", {"tokens": answer["tokens"]}) == {"prompt": "Hello 日本"}


def test_models(server: Live, client: OpenAI) -> None:
    models = client.models.list().data
    assert [(m.id, m.root, m.object) for m in models] == [("tiny", "smollm2", "model"), ("alias", "smollm2", "model")]
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=PARIS)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")


def test_errors_reach_the_client(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a " * 600)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    assert "max_model_len is 512" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a " * 600}], stream=True)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def scrape(server: Live) -> dict[str, float]:
    status, headers, content = server.ask("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {}
    for family in text_string_to_metric_families(content.decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert (labels.pop("model_name"), labels.pop("engine")) == ("tiny", "0")
            values[sample.name + "".join(labels.values())] = sample.value
    return values


def test_metrics_say_what_was_asked(server: Live) -> None:
    before = scrape(server)
    server.post("/v1/completions", {"prompt": "metrics", "max_tokens": 6, "n": 2, "ignore_eos": True})
    server.ask("POST", "/v1/completions", {"prompt": "x", "max_tokens": 4, "stream": True, "ignore_eos": True})
    after = scrape(server)
    change = {name: after[name] - before[name] for name in after}
    tokens = sum(server.post("/tokenize", {"prompt": prompt})["count"] for prompt in ("metrics", "x"))
    assert change["vllm:generation_tokens_total"] == 16 and change["vllm:prompt_tokens_total"] == tokens
    assert change["vllm:request_success_totallength"] == 3 and change["vllm:request_success_totalabort"] == 0
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time",
                 "request_decode_time", "request_inference_time"):  # fmt: skip
        assert change[f"vllm:{name}_seconds_count"] == 2 == change[f"vllm:{name}_seconds_bucket+Inf"]
    total = change["vllm:request_queue_time_seconds_sum"] + change["vllm:request_inference_time_seconds_sum"]
    assert change["vllm:e2e_request_latency_seconds_sum"] == pytest.approx(total)
    assert change["vllm:inter_token_latency_seconds_count"] == 5 * 2 + 3
    assert change["vllm:iteration_tokens_total_count"] >= 6 + 4
    assert change["vllm:iteration_tokens_total_sum"] >= 16
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[f"vllm:{name}"] == 0
    assert after["vllm:num_preemptions_total"] == 0
    assert after["vllm:prefix_cache_queries_total"] > after["vllm:prefix_cache_hits_total"] > 0


@pytest.mark.parametrize(
    ("path", "prompt", "begins"),
    [
        ("/v1/chat/completions", {"messages": PARIS}, '"delta":{"role":"assistant","content":""}'),
        ("/v1/completions", {"prompt": TEXT}, '"text":" '),
    ],
)
def test_nothing_is_said_before_the_first_token(
    server: Live, monkeypatch: pytest.MonkeyPatch, path: str, prompt: dict[str, Any], begins: str
) -> None:
    """Tools take the first chunk's time for the first token's."""
    runner, held = server.llm.engine.runner, threading.Event()
    launch = runner.launch
    monkeypatch.setattr(runner, "launch", lambda batch: held.wait(30) and launch(batch))
    data = json.dumps(prompt | {"max_tokens": 2, "temperature": 0, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(
            b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(data)) + data
        )
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(65536)
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(65536)
        assert head.endswith(b"\r\n\r\n") and b"text/event-stream" in head
        held.set()
        connection.settimeout(30)
        body = b""
        while b"[DONE]" not in body:
            body += connection.recv(65536)
    first = body.decode().split("\n\n")[0]
    assert begins in first and '"finish_reason":null' in first
