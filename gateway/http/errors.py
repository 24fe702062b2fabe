"""What an HTTP client is told of an error: OpenAI's {"error": {message, type, param, code}}.

Knows statuses and shapes. Knows no route. A 500 says only that the log says more: the message of
an unforeseen exception is nothing for clients.
"""

import json
import math
from collections.abc import Mapping
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moe_core.errors import (
    AuthenticationError,
    EpserveError,
    NotFoundError,
    RequestError,
    TooManyRequestsError,
)

# By the error's code: HTTP status, OpenAI's type and code.
STATUSES = {
    "INVALID_ARGUMENT": (400, "invalid_request_error", None),
    "UNAUTHENTICATED": (401, "authentication_error", "invalid_api_key"),
    "PERMISSION_DENIED": (403, "permission_error", "permission_denied"),
    "NOT_FOUND": (404, "not_found_error", "model_not_found"),
    "RESOURCE_EXHAUSTED": (429, "rate_limit_error", "rate_limit_exceeded"),
    "UNAVAILABLE": (503, "service_unavailable_error", "unavailable"),
    "DEADLINE_EXCEEDED": (504, "timeout_error", "deadline_exceeded"),
}
INTERNAL = (500, "server_error", "internal_error")
UNFORESEEN = "this request failed within the server, whose log says why"


class UnreadError(EpserveError):
    """What the client sends is not read to its end, and so the connection is over."""

    status: int
    kind = "invalid_request_error"
    name: str | None = None


class TooLargeError(UnreadError):
    """A body: names its size and the limit."""

    status, name = 413, "body_too_large"


class BodyTimeoutError(UnreadError):
    """A body that did not arrive in time."""

    status, kind, name = 408, "timeout_error", "body_timeout"


class HeadTooLargeError(UnreadError):
    status, name = 431, "head_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request's line and headers have over {limit} bytes; send less")


class HeadTimeoutError(UnreadError):
    status, kind, name = 408, "timeout_error", "head_timeout"

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"the request's headers did not arrive within {limit_s:g} s")


class NotHttpError(UnreadError):
    status = 400

    def __init__(self) -> None:
        super().__init__("this is no HTTP/1.1 request")


def error_response(error: EpserveError) -> Response:
    """The answer to a request that has failed before anything was sent."""
    status, _, _ = _kind(error)
    headers = {}
    if isinstance(error, TooManyRequestsError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, AuthenticationError):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, UnreadError):
        headers["connection"] = "close"
    return JSONResponse(error_body(error), status, headers)


def error_body(error: EpserveError) -> dict[str, object]:
    _, kind, code = _kind(error)
    field = error.field if isinstance(error, RequestError | NotFoundError) else None
    return _body(str(error), kind, field, code)


def error_event(error: Exception) -> bytes:
    """The last event of a stream that fails midway."""
    told = error if isinstance(error, EpserveError) else EpserveError(UNFORESEEN)
    return b"data: " + json.dumps(error_body(told)).encode() + b"\n\n"


async def on_epserve_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EpserveError)
    return error_response(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Routes and methods that there are not."""
    assert isinstance(error, HTTPException)
    headers: Mapping[str, str] = error.headers or {}
    phrase = HTTPStatus(error.status_code).phrase
    message = f"{request.method} {request.url.path}: {phrase}"
    if allowed := headers.get("Allow"):
        message += f"; this path takes {allowed}"
    body = _body(message, "invalid_request_error", None, phrase.lower().replace(" ", "_"))
    return JSONResponse(body, error.status_code, headers)


async def on_unforeseen_error(request: Request, error: Exception) -> Response:
    """Starlette raises it again after this answer, and the server logs it."""
    return error_response(EpserveError(UNFORESEEN))


def _kind(error: EpserveError) -> tuple[int, str, str | None]:
    if isinstance(error, UnreadError):
        return error.status, error.kind, error.name
    return STATUSES.get(error.code, INTERNAL)


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
