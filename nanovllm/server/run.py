"""Listening and ending: the port is open while the model loads, and signals end the server in an orderly way.

The event loop runs on the main thread; a second one loads the model, a third steps the engine (`AsyncLLM`).
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp

from nanovllm.server.app import Service

if TYPE_CHECKING:
    from nanovllm.async_llm import AsyncLLM

KEEP_ALIVE_S = 75  # longer than clients keep their idle connections, so that they close first


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. OSError, with a sentence, where there is none."""
    try:
        found = {entry[0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        family = socket.AF_INET if socket.AF_INET in found else socket.AF_INET6  # localhost is both
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise OSError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from error


def address(sock: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if sock.family == socket.AF_INET6 else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which raise the signal again at the end: we end with status 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    service: Service,
    app: ASGIApp,
    sock: socket.socket,
    load: Callable[[], AsyncLLM],
    grace_s: int,
    say: Callable[[str], None],
) -> bool:
    """Answer until SIGTERM or SIGINT comes; then finish what runs, for `grace_s` seconds at most (twice: at once).

    Raises what `load` raises. False if the signal came while it ran: its thread is inside a library that nothing can
    interrupt, and the process has to end under it.
    """
    loop = asyncio.get_running_loop()
    server = _Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=grace_s,
        )
    )

    def stop() -> None:
        server.force_exit = server.should_exit  # the second time
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):  # Windows
            loop.add_signal_handler(number, stop)
    loading: asyncio.Future[AsyncLLM] = loop.create_future()

    def loaded(done: asyncio.Future[AsyncLLM]) -> None:
        if done.cancelled() or done.exception() is not None:
            server.should_exit = True
        else:
            service.start(done.result())
            say(f"{service.names[0]} is ready at {address(sock)}/v1")

    loading.add_done_callback(loaded)
    threading.Thread(target=_load, args=(load, loading, loop), name="nanovllm-loader", daemon=True).start()
    say(f"listening at {address(sock)}; loading {service.model}")
    await server.serve(sockets=[sock])
    if not loading.done():
        return False
    await loading.result().close()
    return True


def _load(load: Callable[[], AsyncLLM], loading: asyncio.Future[AsyncLLM], loop: asyncio.AbstractEventLoop) -> None:
    try:
        llm = load()
    except Exception as error:
        loop.call_soon_threadsafe(loading.set_exception, error)
    else:
        loop.call_soon_threadsafe(loading.set_result, llm)
