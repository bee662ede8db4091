"""The routes. A `Service` is what they share: the engine once it is loaded, its names, the keys, the numbers."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from nanovllm import __version__
from nanovllm.server import errors
from nanovllm.server.answers import Call, tokenizer_of
from nanovllm.server.chat import read_chat, read_conversation, whole_chat
from nanovllm.server.completions import read_completion
from nanovllm.server.errors import ApiError, JSONResponse, unavailable
from nanovllm.server.grammar import FIELD, Grammars
from nanovllm.server.metrics import Metrics
from nanovllm.server.protocol import Body, parse_json
from nanovllm.server.streaming import EventStream, events, until_disconnect

if TYPE_CHECKING:
    from nanovllm.async_llm import AsyncLLM
    from nanovllm.engine.llm_engine import LLMEngine

MAX_BODY_BYTES = 16 << 20
INLINE_BODY_BYTES = 16 << 10  # longer prompts are tokenized on another thread, for the streams' sake
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


class Service:
    """A model under one or more names. `llm` is None while it loads."""

    def __init__(self, model: str, names: Sequence[str] = (), keys: Sequence[str] = ()) -> None:
        self.model, self.names, self.keys = model, tuple(names) or (model,), tuple(key.encode() for key in keys)
        self.created = int(time.time())
        self.metrics = Metrics(self.names[0])
        self.grammars = Grammars()
        self.llm: AsyncLLM | None = None

    def start(self, llm: AsyncLLM) -> None:
        """The model is loaded: serve it."""
        llm.on_step = self.metrics.on_step
        self.llm = llm

    def ready(self) -> AsyncLLM:
        """The engine, or 503 with the reason."""
        if self.llm is None:
            raise unavailable("the model is being loaded: try again in a moment")
        if not self.llm.is_running:
            raise unavailable("the engine has stopped: restart the server")
        return self.llm

    def check_model(self, body: Body) -> str:
        """The name to answer with; 404 for one that is not served."""
        name = body.text("model") or self.names[0]
        if name not in self.names:
            served = ", ".join(self.names)
            raise ApiError(
                f"the model {name[:200]!r} does not exist: this server has {served}",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip
        return name

    async def follow(self, call: Call, only_end: bool = False) -> AsyncGenerator[None]:
        """Run a call's requests and count them."""
        self.metrics.begin(call.requests)
        try:
            async with aclosing(self.ready().follow(call.requests, only_end)) as news:
                async for _ in news:
                    yield
        except RuntimeError as error:
            raise unavailable(str(error)) from error  # it was closed in between
        finally:
            self.metrics.end(call.requests)


Reader = Callable[[Body, "LLMEngine", str, Grammars], Call]


def create_app(service: Service, allowed_origins: Sequence[str] = ("*",)) -> Starlette:
    """The ASGI application."""
    paths: dict[str, tuple[str, Callable[[Service, Request], Awaitable[Response]]]] = {
        "/v1/chat/completions": ("POST", _chat),
        "/v1/completions": ("POST", _completions),
        "/v1/models": ("GET", _models),
        "/v1/models/{name:path}": ("GET", _model),
        "/tokenize": ("POST", _tokenize),
        "/detokenize": ("POST", _detokenize),
        "/health": ("GET", _health),
        "/metrics": ("GET", _metrics),
        "/version": ("GET", _version),
    }

    def bound(answer: Callable[[Service, Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return await answer(service, request)

        return endpoint

    routes = [Route(path, bound(answer), methods=[method]) for path, (method, answer) in paths.items()]
    cors = Middleware(CORSMiddleware, allow_origins=allowed_origins, allow_methods=["*"], allow_headers=["*"])
    handlers: dict[Any, Any] = {
        ApiError: errors.on_api_error,
        HTTPException: errors.on_http_error,
        RecursionError: errors.on_recursion,
        Exception: errors.on_bug,
    }
    middleware = [cors, Middleware(_Gate, service=service)]
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.router.redirect_slashes = False  # the gate drops them, for not every client follows a redirect
    return app


class _Gate:
    """In front of the routes: the key, and paths that end with a slash."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"].rstrip("/") or "/"
            scope = {**scope, "path": path}
            if path not in ("/health", "/metrics", "/version") and not self._admits(scope):
                error = ApiError(
                    "a valid API key is needed: send it as 'Authorization: Bearer KEY'",
                    status=401, code="invalid_api_key", www_authenticate="Bearer",
                )  # fmt: skip
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        if not self._service.keys:
            return True
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        matches = [hmac.compare_digest(given.strip(), key) for key in self._service.keys]
        return bool(scheme.lower() == b"bearer" and any(matches))


async def _body(request: Request) -> Body:
    """The JSON object of a request. Any content type will do: `curl -d` calls it a form."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise ApiError(f"content-encoding {encoding[:80]} is not supported: send plain JSON", status=415)
    data = bytearray()
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_BODY_BYTES:
                raise ApiError(f"the body is larger than {MAX_BODY_BYTES} bytes", status=413, connection="close")
    except ClientDisconnect as error:
        raise ApiError("the client left", status=400) from error
    return Body(parse_json(bytes(data)), len(data))


async def _off_loop(service: Service, body: Body, work: Callable[[], Any]) -> Any:
    """Run what takes long for long bodies, or to compile a grammar, without holding up the streams."""
    if FIELD in body:
        return await asyncio.get_running_loop().run_in_executor(service.grammars.thread, work)
    return await asyncio.to_thread(work) if body.size > INLINE_BODY_BYTES else work()


async def _generate(service: Service, request: Request, read: Reader, whole: Callable[[Call], Any]) -> Response:
    llm = service.ready()
    body = await _body(request)
    model = service.check_model(body)
    call: Call = await _off_loop(service, body, lambda: read(body, llm.engine, model, service.grammars))
    if call.stream:
        return EventStream(events(call, service.follow(call)))

    async def finished() -> Response:
        async for _ in service.follow(call, only_end=True):
            pass
        return JSONResponse(whole(call))

    answer = await until_disconnect(request.receive, finished())
    return answer or Response(status_code=499)  # nobody reads it; nginx's number for clients that left


async def _chat(service: Service, request: Request) -> Response:
    return await _generate(service, request, read_chat, whole_chat)


async def _completions(service: Service, request: Request) -> Response:
    return await _generate(service, request, read_completion, Call.whole)


def _model_card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "nanovllm",
        "root": service.model,
        "parent": None,
        "max_model_len": service.ready().engine.max_model_len,
    }


async def _models(service: Service, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model_card(service, name) for name in service.names]})


async def _model(service: Service, request: Request) -> Response:
    service.ready()
    return JSONResponse(_model_card(service, service.check_model(Body({"model": request.path_params["name"]}))))


async def _tokenize(service: Service, request: Request) -> Response:
    engine, body = service.ready().engine, await _body(request)
    service.check_model(body)

    def tokens() -> list[int]:
        text = body.text("prompt")
        if text is None:
            ids: list[int] = read_conversation(body, engine)["prompt_token_ids"]
            return ids
        special = body.flag("add_special_tokens", True)
        try:
            return tokenizer_of(engine, "prompt").encode(text, special)
        except ValueError as error:
            raise ApiError(str(error), param="prompt") from error

    ids = await _off_loop(service, body, tokens)
    as_text = body.flag("return_token_strs")
    body.refuse_rest()
    strings = [tokenizer_of(engine, "prompt").id_to_token(i) for i in ids] if as_text else None
    answer = {"count": len(ids), "max_model_len": engine.max_model_len, "tokens": ids, "token_strs": strings}
    return JSONResponse(answer)


async def _detokenize(service: Service, request: Request) -> Response:
    engine, body = service.ready().engine, await _body(request)
    service.check_model(body)
    ids, vocab_size = body.take("tokens"), engine.model_config.vocab_size
    body.refuse_rest()
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise ApiError(f"tokens must be a list of token ids from 0 to {vocab_size - 1}", param="tokens")
    tokenizer = tokenizer_of(engine, "tokens")
    text = await _off_loop(service, body, lambda: tokenizer.decode(ids, skip_special_tokens=False))
    return JSONResponse({"prompt": text})


async def _health(service: Service, request: Request) -> Response:
    service.ready()
    return Response()


async def _metrics(service: Service, request: Request) -> Response:
    return PlainTextResponse(service.metrics.render(service.ready()), media_type=PROMETHEUS)


async def _version(service: Service, request: Request) -> Response:
    return JSONResponse({"version": __version__})
