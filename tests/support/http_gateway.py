"""A SmallGateway's HTTP side on a free port, and clients of it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TypeAlias

import httpx2
from starlette.routing import BaseRoute

from gateway.http.app import Authenticate, anybody, make_app
from gateway.http.body import MAX_BODY_BYTES
from gateway.http.chat_template import ChatTemplate
from gateway.http.host import HttpHost
from support.small_gateway import SmallGateway

TEMPLATE = (
    "{% for message in messages %}{{ ' ' if not loop.first }}{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %} {{ opening or 'wabx' }}{% endif %}"
)


Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def opened(client: httpx2.AsyncClient) -> AsyncIterator[Streams]:
    """A connection of its own to the server of `client`, for what no client sends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port or 0)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):  # the server may have been first
            await writer.wait_closed()


@asynccontextmanager
async def http_side(
    gateway: SmallGateway,
    chat_template: ChatTemplate | None = None,
    *,
    authenticate: Authenticate = anybody,
    extra_routes: Sequence[BaseRoute] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the real server; both end here."""
    app = make_app(
        gateway.generator,
        gateway.registry,
        chat_template,
        authenticate=authenticate,
        extra_routes=extra_routes,
        max_body_bytes=max_body_bytes,
    )
    host = HttpHost()
    port = await host.start(app, "127.0.0.1", 0)
    try:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            yield client
    finally:
        await host.stop(0.2)
