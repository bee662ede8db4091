"""`AsyncLLM`: the same engine for asyncio programs. One thread steps the engine; coroutines await its progress.

The thread sleeps while nothing is queued. Event loops never touch the engine's lock, which is held for as long as a
step takes: they leave their wishes in an inbox that the thread empties between steps, and are woken through
`call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.request import Request, check_request_id
from nanovllm.llm import Message, Prompt
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams


class AsyncLLM:
    """A loaded model for asyncio. Options are `EngineConfig`'s fields, as for `LLM`; loading blocks."""

    def __init__(self, model: str, **kwargs: Any) -> None:
        self.engine = LLMEngine(EngineConfig.from_kwargs(model, **kwargs))
        self._subscribers: dict[str, _Subscriber] = {}
        self._inbox: deque[Callable[[], None]] | None = deque()  # None: the thread has ended
        self._inbox_lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="nanovllm-engine", daemon=True)
        self._thread.start()
        atexit.register(self._stop)  # the interpreter would end the thread inside a kernel, and the process with it

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Yield the growing output of one prompt; the last one is finished. Leaving the loop aborts the request."""
        request = self.engine.make_request(prompt, sampling_params, streaming=True, request_id=request_id)
        subscriber = _Subscriber(request, asyncio.get_running_loop())
        if self._subscribers.setdefault(request.request_id, subscriber) is not subscriber:
            raise ValueError(f"request id {request.request_id!r} is in use: ids of running requests must be unique")
        try:
            self._tell(lambda: self.engine.submit([request]))
            finished = False
            while not finished:
                output = await subscriber.latest()
                finished = output.finished
                yield output
        finally:
            del self._subscribers[request.request_id]
            if not request.finished:
                self._tell_abort(request.request_id)

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """`generate` for a conversation, through the model's chat template."""
        prompt = self.engine.render_chat(messages, True, chat_template_kwargs)
        return self.generate(prompt, sampling_params, request_id)

    async def abort(self, request_id: str) -> None:
        """Stop one request; its stream ends with `finish_reason == "abort"`. Does nothing if it has ended already."""
        check_request_id(request_id)
        self._tell_abort(request_id)

    async def close(self) -> None:
        """Stop the engine thread, abort what runs, free the model."""
        if self._closing:
            return
        self._closing = True
        await asyncio.to_thread(self._stop)
        atexit.unregister(self._stop)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def _stop(self) -> None:
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _serve(self) -> None:
        try:
            while not self._closing:
                self._read_inbox()
                step = self.engine.step()
                self._publish_all()
                if step is None:
                    self._wake.wait()
                    self._wake.clear()  # before the conditions are read again, so that no call is missed
        finally:  # whatever ended this thread, nobody shall wait for it
            with self._inbox_lock:
                self._read_inbox()
                self._inbox = None
            self.engine.close()
            self._publish_all()

    def _tell(self, wish: Callable[[], None]) -> None:
        """Have the engine's thread call `wish` between two steps."""
        with self._inbox_lock:
            if self._inbox is None:
                raise RuntimeError("this engine is closed: make a new AsyncLLM")
            self._inbox.append(wish)
        self._wake.set()

    def _tell_abort(self, request_id: str) -> None:
        with contextlib.suppress(RuntimeError):  # closed: it has been aborted already
            self._tell(lambda: self.engine.abort(request_id))

    def _read_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _publish_all(self) -> None:
        for subscriber in list(self._subscribers.values()):
            subscriber.publish()


class _Subscriber:
    """Hands the newest output of a request to its coroutine; outputs that nobody awaited in time are merged."""

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self.request = request
        self._loop = loop
        self._changed = asyncio.Event()
        self._published = 0
        self._seen = 0

    def publish(self) -> None:
        """Called by the engine's thread after a step."""
        version = self.request.version
        if version != self._published:
            self._published = version
            with contextlib.suppress(RuntimeError):  # its loop was closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._changed.set)

    async def latest(self) -> RequestOutput:
        """Wait until the request has something that was not yielded yet."""
        while self.request.version == self._seen:
            await self._changed.wait()
            self._changed.clear()
        self._seen = self.request.version
        return self.request.output()
