"""The page's files and documents as a browser is answered, over the gateway's own HTTP side."""

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest

import gateway.page
from gateway.callers import ANONYMOUS, Caller
from gateway.http.app import Authenticate, anybody
from gateway.metrics.requests import RequestMetrics
from gateway.page.routes import PAGE_FILES, page_routes
from moe_core.cluster import Role
from moe_core.errors import AuthenticationError
from support.http_gateway import http_side
from support.small_gateway import SmallGateway

STATIC = Path(str(gateway.page.__file__)).parent / "static"
DOCUMENTS = ("/cluster", "/cluster/experts", "/cluster/placement")


@asynccontextmanager
async def page(authenticate: Authenticate = anybody) -> AsyncIterator[httpx2.AsyncClient]:
    async with SmallGateway() as small:
        await small.add_worker(Role.EXPERT)
        metrics = RequestMetrics("small", 128)
        routes = page_routes(small.registry, small.generator.model, metrics.registry)
        async with http_side(small, authenticate=authenticate, extra_routes=routes) as client:
            yield client


def only_with(key: str) -> Callable[[str | None], Caller]:
    def authenticate(authorization: str | None) -> Caller:
        if authorization != f"Bearer {key}":
            raise AuthenticationError("the API key is not known here")
        return ANONYMOUS

    return authenticate


async def test_files_are_served_with_a_policy_that_allows_this_origin_only():
    async with page() as client:
        for path in sorted(PAGE_FILES):
            answer = await client.get(path)
            assert answer.status_code == 200, path
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'self';")
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
        index = await client.get("/")
        assert index.headers["content-type"] == "text/html; charset=utf-8"
        for name in re.findall(r'(?:src|href)="(page/[^"]+)"', index.text):
            assert f"/{name}" in PAGE_FILES


def test_every_file_in_the_folder_is_served_and_names_no_other_origin():
    names = {"index.html" if path == "/" else path.rpartition("/")[2] for path in PAGE_FILES}
    assert names == {path.name for path in STATIC.iterdir()}
    for path in STATIC.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"(?m)^\s*//.*$|\s//\s.*$", "", text), path
        assert "style=" not in text, path


@pytest.mark.parametrize("path", ["/", "/cluster"])
async def test_what_a_browser_has_already_is_not_sent_again(path: str):
    async with page() as client:
        first = await client.get(path)
        again = await client.get(path, headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        plain = await client.get(path, headers={"accept-encoding": "identity"})
        assert "content-encoding" not in plain.headers
        assert plain.content == first.content


async def test_documents_tell_of_the_cluster():
    async with page() as client:
        cluster, experts, placement = [(await client.get(path)).json() for path in DOCUMENTS]
        assert cluster["model"]["name"] == "small"
        assert cluster["counts"] == {"attn": {"absent": 1}, "expert": {"ready": 1}}
        assert experts["version"] == cluster["expert_load_version"]
        assert placement["epoch"] == cluster["placement_epoch"]


async def test_documents_need_a_key_where_keys_are_on_and_files_do_not():
    async with page(only_with("right")) as client:
        assert (await client.get("/")).status_code == 200
        for path in DOCUMENTS:
            refused = await client.get(path)
            assert refused.status_code == 401
            assert "API key" in refused.json()["error"]["message"]
            let_in = await client.get(path, headers={"authorization": "Bearer right"})
            assert let_in.status_code == 200
            assert "authorization" in let_in.headers["vary"]
            assert "private" in let_in.headers["cache-control"]
