"""`AsyncLLM`: the same engine for asyncio programs. One thread steps the engine; coroutines await its progress.

The thread sleeps while nothing is queued. It shares nothing with the event loop but the engine's lock and, for each
request, a queue that it fills through `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.request import Request
from nanovllm.llm import Message, Prompt
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams


class AsyncLLM:
    """A loaded model for asyncio. Options are `EngineConfig`'s fields, as for `LLM`; loading blocks."""

    def __init__(self, model: str, **kwargs: Any) -> None:
        self.engine = LLMEngine(EngineConfig.from_kwargs(model, **kwargs))
        self._subscribers: dict[str, _Subscriber] = {}
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="nanovllm-engine", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Yield the growing output of one prompt; the last one is finished. Leaving the loop aborts the request."""
        request = self.engine.make_request(prompt, sampling_params, streaming=True, request_id=request_id)
        subscriber = _Subscriber(request, asyncio.get_running_loop())
        self._subscribers[request.request_id] = subscriber
        try:
            self.engine.submit([request])
            self._wake.set()
            finished = False
            while not finished:
                output = await subscriber.latest()
                finished = output.finished
                yield output
        finally:
            self._subscribers.pop(request.request_id, None)
            self.engine.abort(request.request_id)

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """`generate` for a conversation, through the model's chat template."""
        prompt = self.engine.render_chat(messages, True, **(chat_template_kwargs or {}))
        return self.generate(prompt, sampling_params, request_id)

    async def abort(self, request_id: str) -> None:
        """Stop one request; its stream ends with `finish_reason == "abort"`."""
        self.engine.abort(request_id)
        subscriber = self._subscribers.get(request_id)
        if subscriber is not None:
            subscriber.publish()

    async def close(self) -> None:
        """Stop the engine thread, abort what runs, free the model."""
        if self._closing:
            return
        self._closing = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)
        self.engine.close()
        for subscriber in list(self._subscribers.values()):
            subscriber.publish()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def _serve(self) -> None:
        while not self._closing:
            self._wake.clear()
            while not self._closing and self.engine.step() is not None:
                for subscriber in list(self._subscribers.values()):
                    subscriber.publish()
            self._wake.wait()


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
        if version != self._published and not self._loop.is_closed():
            self._published = version
            self._loop.call_soon_threadsafe(self._changed.set)

    async def latest(self) -> RequestOutput:
        """Wait until the request has something that was not yielded yet."""
        while self.request.version == self._seen:
            await self._changed.wait()
            self._changed.clear()
        self._seen = self.request.version
        return self.request.output()
