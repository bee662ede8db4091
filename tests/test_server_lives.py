"""The server through its life: loading, keys, clients that leave, storms of rubbish, a dead engine, signals."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from server_lives import Live, live, live_smollm2, wait_for
from tiny_models import save_model

from nanovllm import AsyncLLM
from nanovllm.cli import main

ROOT = Path(__file__).resolve().parent.parent
COMPLETIONS = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live_smollm2(keys=["open sesame", "second"]) as server:
        yield server


def send(server: Live, body: dict[str, Any]) -> socket.socket:
    """A request on a socket of its own; the answer is not read."""
    data = json.dumps(body).encode()
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer second\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(head.encode() + data)
    return connection


def works(server: Live) -> bool:
    body = {"prompt": "The capital of France is", "max_tokens": 3, "temperature": 0}
    status, _, content = server.ask("POST", COMPLETIONS, body, authorization="Bearer second")
    return status == 200 and "Paris" in json.loads(content)["choices"][0]["text"]


def test_keys(server: Live) -> None:
    assert works(server)
    body = {"prompt": "a", "max_tokens": 1}
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic second"}, {"authorization": ""}):
        for path in (COMPLETIONS, "/tokenize", "/v1/models", "//v1/models", "/v1/completions/"):
            status, answer, content = server.ask("POST", path, body, **headers)
            assert status == 401 and json.loads(content)["error"]["code"] == "invalid_api_key"
            assert answer["www-authenticate"] == "Bearer"
    for path in ("/health", "/version", "/metrics"):  # for probes
        assert server.ask("GET", path)[0] == 200
    client = OpenAI(base_url=f"{server.url}/v1", api_key="open sesame")
    assert client.models.list().data[0].id == "smollm2"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(server: Live, stream: bool) -> None:
    aborted = server.service.metrics._ended["abort"]
    connection = send(server, LONG | {"stream": stream, "n": 2})
    wait_for(lambda: bool(server.llm.engine.scheduler.running))
    if stream:
        connection.recv(4096)
    connection.close()
    wait_for(server.idle, 10)  # 400 tokens would take longer
    assert server.service.metrics._ended["abort"] == aborted + 2
    assert works(server)


def test_a_client_that_never_reads_ends_with_its_connection(server: Live) -> None:
    body = LONG | {"stream": True, "max_tokens": 40, "n": 4, "logprobs": 100}  # more than the sockets' buffers hold
    connection = send(server, body)
    wait_for(lambda: not server.llm.engine.has_unfinished and bool(server.service.metrics._active) or server.idle())
    connection.close()
    wait_for(server.idle)


def test_a_storm(server: Live) -> None:
    """200 connections at once: rubbish, half requests, clients that leave at any moment, and good ones between."""
    rng = random.Random(0)
    rubbish = [
        b"\x00" * 100, b"GET", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", b"\x16\x03\x01\x02", b"\r\n" * 50,
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]  # fmt: skip
    held = []
    for i in range(200):
        if i % 5 == 0:
            held.append(send(server, LONG | {"prompt": f"Story {i}", "stream": i % 2 == 0, "n": 1 + i % 3}))
        else:
            connection = socket.create_connection(("127.0.0.1", server.port))
            connection.sendall(rng.choice(rubbish))
            held.append(connection)
    assert server.ask("GET", "/health")[0] == 200
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(works, server) for _ in range(4)]  # wait behind 40 stories
        rng.shuffle(held)
        for connection in held:
            connection.close()
        assert all(answer.result() for answer in asked)
    wait_for(server.idle)


def test_one_connection_serves_many_requests(server: Live) -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for body in ({"prompt": "a", "max_tokens": 1}, {"bad": 1}, {"prompt": "b", "max_tokens": 1, "stream": True}):
        connection.request("POST", COMPLETIONS, json.dumps(body), {"Authorization": "Bearer second"})
        assert connection.getresponse().read()
        assert connection.sock is not None


def test_while_the_model_loads() -> None:
    with live(None) as server:
        for method, path in (("GET", "/health"), ("GET", "/v1/models"), ("POST", COMPLETIONS), ("GET", "/metrics")):
            status, headers, content = server.ask(method, path, {"prompt": "a"} if method == "POST" else None)
            assert (status, headers["retry-after"]) == (503, "1")
            assert "being loaded" in json.loads(content)["error"]["message"]
        assert server.ask("GET", "/version")[0] == 200


def test_an_engine_that_dies_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits is told, whoever comes later is told, and /health says 503."""
    save_model("llama", tmp_path)
    llm = AsyncLLM(str(tmp_path), max_model_len=200, num_kvcache_blocks=64, show_progress=False)
    steps = iter(range(5))
    step = llm.engine.step
    died = threading.Event()

    def dying() -> Any:
        if llm.engine.has_unfinished and next(steps, None) is None:
            died.set()
            raise SystemError("broken")
        return step()

    monkeypatch.setattr(threading, "excepthook", lambda details: None)  # which would print the error
    monkeypatch.setattr(llm.engine, "step", dying)
    body = {"prompt": [1, 2, 3], "max_tokens": 100, "ignore_eos": True}
    with live(llm) as server:
        connection = send(server, body | {"stream": True})
        status, _, content = server.ask("POST", COMPLETIONS, body)
        assert status == 503 and "stopped" in json.loads(content)["error"]["message"]
        streamed = b""
        while b"[DONE]" not in streamed:
            streamed += connection.recv(65536)
        assert b'data: {"error":{"message":"the engine stopped' in streamed
        connection.close()
        assert died.is_set()
        for path in ("/health", "/v1/models"):
            assert server.ask("GET", path)[0] == 503
        assert server.ask("POST", COMPLETIONS, body)[0] == 503
        assert not server.service.metrics._active


def test_a_request_that_fails_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model("llama", tmp_path)
    llm = AsyncLLM(str(tmp_path), max_model_len=200, num_kvcache_blocks=64, show_progress=False)
    launch, failing = llm.engine.runner.launch, iter([False, False, True])
    monkeypatch.setattr(llm.engine.runner, "launch", lambda b: 1 / 0 if next(failing, False) else launch(b))
    body = {"prompt": [1, 2, 3], "max_tokens": 9, "ignore_eos": True}
    with live(llm) as server:
        _, _, content = server.ask("POST", COMPLETIONS, body | {"stream": True})
        error = json.loads(content.decode().split("\n\n")[-3].removeprefix("data: "))["error"]
        assert error["type"] == "server_error" and "division by zero" in error["message"]
        assert server.post(COMPLETIONS, body)["usage"]["completion_tokens"] == 9
        assert server.idle()
    llm._stop()


# ---------------------------------------------------------------------------------------------------- the command


def start(model: str, *options: str) -> tuple[subprocess.Popen[str], int]:
    """The command in a process of its own, and its port."""
    command = [sys.executable, "-m", "nanovllm", "serve", model, "--port", "0", "--max-model-len", "200", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ})
    watchdog = threading.Timer(60, process.kill)  # what is read from it below comes to an end
    watchdog.daemon = True
    watchdog.start()
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.match(r"listening at http://127\.0\.0\.1:(\d+); loading ", line)
    assert found is not None, line + process.stderr.read()
    return process, int(found.group(1))


def test_the_command_loads_serves_and_ends(tmp_path: Path) -> None:
    """503 from the first moment, 200 when loaded; SIGTERM lets what runs come to its end, with status 0."""
    save_model("llama", tmp_path)
    process, port = start(
        str(tmp_path), "--served-model-name", "one", "two", "--seed", "3", "--num-kvcache-blocks", "99"
    )
    server = Live(port, None)  # type: ignore[arg-type]
    try:
        states = []
        while not states or states[-1] != 200:
            states.append(server.ask("GET", "/health")[0])
            time.sleep(0.02)
        assert states[0] == 503 and set(states) == {503, 200}
        assert [m["id"] for m in json.loads(server.ask("GET", "/v1/models")[2])["data"]] == ["one", "two"]
        body = {"model": "two", "prompt": [1, 2, 3], "max_tokens": 150, "ignore_eos": True, "stream": True}
        connection = send(server, body)
        assert connection.recv(10)
        process.send_signal(signal.SIGTERM)
        data = b""
        while piece := connection.recv(65536):
            data += piece
        assert b'"finish_reason":"length"' in data and data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert process.wait(20) == 0
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
    finally:
        process.kill()


def test_the_grace_ends(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    process, port = start(str(tmp_path), "--shutdown-timeout", "1", "--max-model-len", "256")
    server = Live(port, None)  # type: ignore[arg-type]
    try:
        wait_for(lambda: server.ask("GET", "/health")[0] == 200)
        body = {"prompt": [1, 2, 3], "max_tokens": 250, "ignore_eos": True, "stream": True, "n": 400, "logprobs": 20}
        connection = send(server, body)
        assert connection.recv(10)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert time.monotonic() - started < 15
    finally:
        process.kill()


def test_a_signal_while_loading(tmp_path: Path) -> None:
    process, _ = start("smollm2")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert process.stderr is not None and "stopped while loading" in process.stderr.read()


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    process, _ = start(str(tmp_path))
    assert process.stderr is not None
    said = process.stderr.read()
    assert process.wait(20) == 2 and said.count("\n") == 1 and said.startswith("nanovllm: ") and "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--api-key", ""], "the API key is empty"),
        (["--port", "99999999"], "cannot listen on 127.0.0.1:99999999"),
        (["--host", "nowhere.invalid"], "cannot listen on nowhere.invalid:8000"),
        (["--shutdown-timeout", "-1"], "--shutdown-timeout must be"),
        (["--max-num-seqs", "0"], "max_num_seqs must be a positive integer"),
    ],
)
def test_mistakes_on_the_command_line(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    interval = sys.getswitchinterval()
    assert main(["serve", "smollm2", *options]) == 2
    sys.setswitchinterval(interval)
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_without_the_extra_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['uvicorn'] = None; from nanovllm.cli import main; sys.exit(main(['serve', 'x']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (
        2,
        "nanovllm: serve needs uvicorn: pip install starlette uvicorn llguidance\n",
    )
