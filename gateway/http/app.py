"""The HTTP side's application: its routes, who may use them, and how errors are answered.

Knows which path is whose. Every path but OPEN_PATHS is asked for a caller first, paths that do
not exist included.
"""

import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.callers import ANONYMOUS, Caller
from gateway.cluster import Registry
from gateway.generation import Generator
from gateway.http import about, errors
from gateway.http.body import MAX_BODY_BYTES
from gateway.http.chat import chat_completions
from gateway.http.chat_template import ChatTemplate
from gateway.http.completions import completions
from gateway.http.context import HttpContext
from gateway.http.tokens import detokenize, tokenize
from gateway.page.routes import PAGE_FILES
from moe_core.errors import EpserveError

OPEN_PATHS = frozenset({"/health", "/ready"}) | PAGE_FILES
Authenticate = Callable[[str | None], Caller]
"""From the Authorization header to who that is. Raises AuthenticationError."""


def anybody(authorization: str | None) -> Caller:
    return ANONYMOUS


def make_app(
    generator: Generator,
    registry: Registry,
    chat_template: ChatTemplate | None = None,
    *,
    authenticate: Authenticate = anybody,
    extra_routes: Sequence[BaseRoute] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
) -> Starlette:
    """The application over a gateway's parts; it owns none of them. Its extra routes ask for a
    caller like all others."""
    app = Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/models", about.models),
            Route("/v1/models/{model_id:path}", about.model),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/health", about.health),
            Route("/ready", about.ready),
            Route("/version", about.version),
            *extra_routes,
        ],
        middleware=[Middleware(_AskForCaller, authenticate=authenticate)],
        exception_handlers={
            EpserveError: errors.on_epserve_error,
            HTTPException: errors.on_http_error,
            Exception: errors.on_unforeseen_error,
        },
    )
    app.state.context = HttpContext(
        generator, registry, chat_template, max_body_bytes, int(time.time()), version("epserve")
    )
    return app


class _AskForCaller:
    """Sets `request.state.caller`."""

    def __init__(self, app: ASGIApp, authenticate: Authenticate) -> None:
        self._app = app
        self._authenticate = authenticate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                caller = self._authenticate(Headers(scope=scope).get("authorization"))
            except EpserveError as error:
                await errors.error_response(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)
