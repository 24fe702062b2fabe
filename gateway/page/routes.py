"""The page at `/`: its files, and the documents that it asks for once a second.

Knows paths and headers. The documents ask for a caller like every other path of the application
that these routes are given to; the files in PAGE_FILES tell nothing and need none.
"""

from collections.abc import Callable
from importlib.resources import files

from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.admission import ServedModel
from gateway.cluster import Registry
from gateway.page.documents import Documents, Rendered, rendered

_INDEX = "index.html"
_FOLDER = "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FILES = (
    *(_INDEX, "page.css", "icon.svg"),
    *("page.js", "source.js", "rates.js", "format.js", "svg.js"),
    *("topology.js", "heatmap.js", "colors.js", "groups.js", "prompt.js"),
)
_JSON = "application/json"
_FILE_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "vary": "accept-encoding",
    "x-content-type-options": "nosniff",
}
_DOCUMENT_HEADERS = {
    "cache-control": "private, no-cache",
    "vary": "accept-encoding, authorization",
    "x-content-type-options": "nosniff",
}


def _path(name: str) -> str:
    return "/" if name == _INDEX else f"/{_FOLDER}/{name}"


PAGE_FILES = frozenset(map(_path, _FILES))


def page_routes(registry: Registry, model: ServedModel, metrics: CollectorRegistry) -> list[Route]:
    """Routes over a gateway's parts; they own none of them. `metrics` are those of requests. The
    prompt box uses the application's own /v1/completions."""
    documents = Documents(registry, model, metrics)
    return [
        *(_file_route(name) for name in _FILES),
        _document_route("/cluster", documents.cluster),
        _document_route("/cluster/experts", documents.experts),
        _document_route("/cluster/placement", documents.placement),
    ]


def _file_route(name: str) -> Route:
    content = rendered(files("gateway.page").joinpath("static", name).read_bytes())
    kind = _TYPES[name[name.rindex(".") :]]

    async def answer(request: Request) -> Response:
        return _answer(request, content, kind, _FILE_HEADERS)

    return Route(_path(name), answer, name=f"page {name}")


def _document_route(path: str, document: Callable[[], Rendered]) -> Route:
    async def answer(request: Request) -> Response:
        return _answer(request, document(), _JSON, _DOCUMENT_HEADERS)

    return Route(path, answer, name=path)


def _answer(request: Request, content: Rendered, kind: str, headers: dict[str, str]) -> Response:
    """Nothing but the headers where the browser has this very content."""
    sent = headers | {"etag": content.tag}
    if request.headers.get("if-none-match") == content.tag:
        return Response(status_code=304, headers=sent)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(
            content.packed, media_type=kind, headers=sent | {"content-encoding": "gzip"}
        )
    return Response(content.plain, media_type=kind, headers=sent)
