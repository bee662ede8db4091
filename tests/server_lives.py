"""A server in a thread of this process, and the plainest of clients, for the tests of `nanovllm.server`."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn

from nanovllm import AsyncLLM
from nanovllm.server.app import Service, create_app
from nanovllm.server.run import listen

SMALL: dict[str, Any] = dict(max_model_len=512, kv_cache_memory_bytes=64 << 20, max_num_seqs=16, show_progress=False)


@dataclass
class Live:
    """A running server."""

    port: int
    service: Service

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def llm(self) -> AsyncLLM:
        assert self.service.llm is not None
        return self.service.llm

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """One request: (status, headers, body). `body`: bytes as they are, anything else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content

    def post(self, path: str, body: Any) -> dict[str, Any]:
        """The JSON of an answer with status 200."""
        status, _, content = self.ask("POST", path, body)
        assert status == 200, content
        return json.loads(content)

    def refusal(self, path: str, body: Any, status: int = 400) -> dict[str, Any]:
        """The error object of a refusal, whose form is checked."""
        got, _, content = self.ask("POST", path, body)
        assert got == status, content
        answer = json.loads(content)
        assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}
        assert answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"
        return answer["error"]

    def idle(self) -> bool:
        """Whether nothing runs, waits or is remembered in the engine."""
        engine = self.llm.engine
        left = engine.has_unfinished or engine._requests or engine._owner or self.llm._subscribers
        return not left and not self.service.metrics._active and engine.scheduler.block_manager.usage == 0.0


@contextlib.contextmanager
def live(llm: AsyncLLM | None, **options: Any) -> Iterator[Live]:
    """Serve `llm`, or a model that never finishes loading."""
    service = Service("smollm2", **options)
    if llm is not None:
        service.start(llm)
    sock = listen("127.0.0.1", 0)
    config = uvicorn.Config(create_app(service), lifespan="off", log_level="warning", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield Live(sock.getsockname()[1], service)
    finally:
        server.should_exit = True
        thread.join(60)
        sock.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def live_smollm2(**options: Any) -> Iterator[Live]:
    """The real SmolLM2 behind HTTP."""
    llm = AsyncLLM("smollm2", **SMALL)
    try:
        with live(llm, **options) as server:
            yield server
    finally:
        llm._stop()


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Return once `condition` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
