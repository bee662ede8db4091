"""Answers that arrive while they are made, as server-sent events, and clients that do not wait for the end.

A chunk is written when the engine has news and the event loop has time: tokens that came meanwhile go into the same
chunk. Nothing is modelled or validated per token; a chunk is a fixed head, the choices' JSON and a fixed tail.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanovllm.server.answers import Call, encode
from nanovllm.server.errors import NO_SURROGATES, ApiError, json_bytes

T = TypeVar("T")
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # the second: proxies such as nginx hold back


class EventStream(Response):
    """Sends chunks as they come; a client that leaves ends their making."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes]) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Starlette's entrance."""
        await until_disconnect(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._chunks):
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T | None:
    """The result of `work`; None when the client leaves first, and `work` is cancelled."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    except OSError:  # writing found out first
        return None
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def events(call: Call, news: AsyncGenerator[None]) -> AsyncGenerator[bytes]:
    """The chunks of an answer: who speaks, the text, why it ends, usage where it is asked for, and [DONE]."""
    head = "data: " + encode(call.head(call.style.chunk_object))[:-1] + ',"choices":['
    tail = "]" + (',"usage":null' if call.include_usage else "") + "}\n\n"
    try:
        async with aclosing(_pieces(call, news)) as chunks:
            async for pieces in chunks:
                yield "".join(head + piece + tail for piece in pieces).encode("utf-8", NO_SURROGATES)
        if call.include_usage:
            yield f'{head}],"usage":{encode(call.usage())}}}\n\n'.encode("utf-8", NO_SURROGATES)
    except ApiError as error:  # too late for a status
        yield b"data: " + json_bytes(error.body()) + b"\n\n"
    yield b"data: [DONE]\n\n"


async def _pieces(call: Call, news: AsyncGenerator[None]) -> AsyncGenerator[list[str]]:
    """The choices' JSON for each chunk. Nothing is said before the first token: clients time it by what comes first."""
    choices = call.choices()
    async with aclosing(news):
        async for _ in news:
            pieces = [piece for choice in choices for piece in choice.pieces()]
            choices = [choice for choice in choices if not choice.closed]
            if pieces:
                yield pieces
