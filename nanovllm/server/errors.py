"""Errors as OpenAI's clients expect them: a status and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

NO_SURROGATES = "backslashreplace"  # half a surrogate pair becomes \udXXX, which is JSON for itself


def json_bytes(content: Any) -> bytes:
    """Compact JSON in UTF-8; ValueError for NaN and infinities, which JSON lacks."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", NO_SURROGATES)


class JSONResponse(Response):
    """A JSON answer, whatever strings it holds."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return json_bytes(content)


class ApiError(Exception):
    """What a client is told; `param` is the field that is to blame."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        headers = {name.replace("_", "-"): value for name, value in self.headers.items()}
        return JSONResponse(self.body(), self.status, headers)


def unavailable(message: str) -> ApiError:
    """503: try again later. OpenAI's clients do so by themselves."""
    return ApiError(message, status=503, code="service_unavailable", retry_after="1")


async def on_api_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for what we raised."""
    return error.response() if isinstance(error, ApiError) else await on_bug(request, error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such path, no such method."""
    status = getattr(error, "status_code", 500)
    sentences = {
        404: f"there is nothing at {request.url.path}: the API is under /v1",
        405: f"{request.url.path} does not answer {request.method}",
    }
    headers = dict(getattr(error, "headers", None) or {})
    return ApiError(sentences.get(status, str(error)), status=status, **headers).response()


async def on_recursion(request: Request, error: Exception) -> Response:
    """JSON that was shallow enough to be read may be too deep to be shown in a sentence."""
    return ApiError("the body is nested too deeply").response()


async def on_bug(request: Request, error: Exception) -> Response:
    """Whatever else: the log has the traceback, the client a sentence."""
    return ApiError(f"the server failed: {type(error).__name__}", status=500).response()
