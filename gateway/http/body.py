"""A request's body: read within limits, parsed strictly.

Knows sizes, JSON and pydantic; knows no field. Refused before it costs anything: bodies over
the limit (nothing of one is kept whose size is declared), NaN and Infinity, numbers of over
4,300 digits, nesting of over 200 levels, half of a surrogate pair.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from gateway.http.errors import BodyTimeoutError, TooLargeError
from moe_core.errors import RequestError

MAX_BODY_BYTES = 8 * 1024 * 1024
MAX_DISCARDED_BYTES = 64 * 1024 * 1024
BODY_TIMEOUT_S = 60.0
MAX_SHOWN = 60


class Body(BaseModel):
    """Fields are of exactly their JSON type: "1", 1.0 and true are no integers. Fields that are
    unknown are ignored, as OpenAI's clients send new ones every month."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


B = TypeVar("B", bound=Body)


async def read_json(request: Request, limit: int) -> dict[str, object]:
    """The JSON object that was sent. Raises RequestError, TooLargeError, BodyTimeoutError."""
    content = await _read(request, limit)
    try:
        values = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise RequestError(f"the body must be a JSON object, not {_json_name(values)}")
    return values


def parse(kind: type[B], values: dict[str, object]) -> B:
    """Raises RequestError for the first field that is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        rule = first["msg"][:1].lower() + first["msg"][1:]
        where = _path(first["loc"]) or "body"
        if first["type"] == "missing":
            raise RequestError(f"{where}: is required") from None
        raise RequestError(f"{where}={_shown(first['input'])}: {rule}") from None


async def _read(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            if declared.isdecimal() and int(declared) > limit:
                await _discard(request)
                raise TooLargeError(f"the body has {declared} bytes; at most {limit} are taken")
            async for part in _parts(request):
                content += part
                if len(content) > limit:
                    del content
                    await _discard(request)
                    raise TooLargeError(f"the body has more than the {limit} bytes that are taken")
    except TimeoutError:
        raise BodyTimeoutError(f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None
    return bytes(content)


async def _parts(request: Request) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise RequestError("the body ended early: the client has gone")
        more = message.get("more_body", False)
        yield message.get("body", b"")


async def _discard(request: Request) -> None:
    """Let a client finish, within limits: one that still sends as its connection is closed sees
    no answer."""
    left = MAX_DISCARDED_BYTES
    async for part in _parts(request):
        left -= len(part)
        if left < 0:
            return


def _path(loc: tuple[int | str, ...]) -> str:
    """As in stream_options.include_usage, stop[2] or logit_bias[15]."""
    parts = [str(part)[:MAX_SHOWN] for part in loc]
    return "".join(f"[{each}]" if each.isdecimal() else f".{each}" for each in parts).strip(".")


def _shown(value: object) -> str:
    """As the client wrote it."""
    names = {None: "null", True: "true", False: "false"}
    text = names[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _json_name(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
