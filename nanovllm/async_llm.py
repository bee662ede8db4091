"""`AsyncLLM`: the same engine for asyncio programs. One thread steps the engine; coroutines await its progress.

The thread sleeps while nothing is queued. Event loops never touch the engine's lock, which is held for as long as a
step takes: they leave their wishes in an inbox that the thread empties between steps, and are woken through
`call_soon_threadsafe`, once a step however many requests they follow. Both run Python, of which only one can run at a
time: after a round of news a loop is left alone for twice as long as the round took, so that it takes a third of the
time at most, and many streams get their tokens in twos and threes rather than late. Other work may lengthen a round;
nobody waits for longer than `MAX_REST_S` because of that.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import LLMEngine, StepInfo
from nanovllm.engine.request import Request, check_request_id
from nanovllm.llm import Message, Prompt
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

REST = 2.0  # pause after a round of news, in lengths of the round
MAX_REST_S = 0.05


class AsyncLLM:
    """A loaded model for asyncio. Options are `EngineConfig`'s fields, as for `LLM`; loading blocks."""

    def __init__(self, model: str, **kwargs: Any) -> None:
        self.engine = LLMEngine(EngineConfig.from_kwargs(model, **kwargs))
        self._subscribers: dict[str, _Subscriber] = {}
        self._inbox: deque[Callable[[], None]] | None = deque()  # None: the thread has ended
        self._inbox_lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._rest_until = 0.0  # on the monotonic clock
        self.on_step: Callable[[StepInfo | None], None] | None = None  # called by the thread after every step
        self._thread = threading.Thread(target=self._serve, name="nanovllm-engine", daemon=True)
        self._thread.start()
        atexit.register(self._stop)  # the interpreter would end the thread inside a kernel, and the process with it

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Yield the growing output of one prompt; the last one is finished. Leaving the loop aborts the request."""
        request = self.engine.make_request(prompt, sampling_params, streaming=True, request_id=request_id)
        async with contextlib.aclosing(self.follow([request])) as news:
            async for _ in news:
                output = request.output()
                yield output
                if output.finished:
                    return

    async def follow(self, requests: Sequence[Request], only_end: bool = False) -> AsyncGenerator[None]:
        """Run requests that `engine.make_request` made; yield when any has news, the last time when all have finished.

        For whoever reads `Request.completions` without copies. `only_end`: the end of each request is the only news.
        Leaving the loop aborts those that still run.
        """
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        mine: list[_Subscriber] = []
        try:
            for request in requests:
                subscriber = _Subscriber(request, loop, changed, only_end)
                if self._subscribers.setdefault(request.request_id, subscriber) is not subscriber:
                    raise ValueError(
                        f"request id {request.request_id!r} is in use: ids of running requests must be unique"
                    )
                mine.append(subscriber)
            self._tell(lambda: self.engine.submit(requests))
            finished = False
            while not finished:
                await changed.wait()
                changed.clear()
                finished = all(request.finished for request in requests)
                yield
        finally:
            for subscriber in mine:
                del self._subscribers[subscriber.request.request_id]
                if not subscriber.request.finished:
                    self._tell_abort(subscriber.request.request_id)

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

    @property
    def is_running(self) -> bool:
        """Whether the engine's thread lives: not closed, and nothing has ended it."""
        return self._inbox is not None

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
                if self.on_step is not None:
                    self.on_step(step)
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
        rested = time.monotonic() >= self._rest_until
        changed: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
        for subscriber in list(self._subscribers.values()):
            if subscriber.has_news(rested):
                changed.setdefault(subscriber.loop, []).append(subscriber.changed)
        for loop, events in changed.items():
            with contextlib.suppress(RuntimeError):  # it was closed: nobody listens any more
                loop.call_soon_threadsafe(self._wake_all, loop, events)

    def _wake_all(self, loop: asyncio.AbstractEventLoop, events: list[asyncio.Event]) -> None:
        """Called by a loop. What it does behind this, for those that wake up, is the time it took."""
        started = time.monotonic()
        for event in events:
            event.set()
        loop.call_soon(self._rest, started)  # comes after them

    def _rest(self, started: float) -> None:
        now = time.monotonic()
        self._rest_until = now + min(REST * (now - started), MAX_REST_S)


@dataclass(slots=True)
class _Subscriber:
    """Whom to wake when a request has news. Those that follow several requests at once share one event."""

    request: Request
    loop: asyncio.AbstractEventLoop
    changed: asyncio.Event
    only_end: bool = False
    published: int = 0  # the version that was told last

    def has_news(self, rested: bool) -> bool:
        """Called by the engine's thread after a step; the same news is told once. First and last ones do not wait."""
        version, finished = self.request.version, self.request.finished
        if version == self.published or not (finished or (not self.only_end and (rested or self.published == 0))):
            return False
        self.published = version
        return True
