"""Every route of the gateway's HTTP port refuses whoever has not shown what it needs.

The routes are those of the application that the gateway's own process makes, and the expectation is
of all of them but what is named here: a new one is refused like its neighbours, or fails these
tests. What else a route answers is other files' business.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from gateway import process
from gateway.api_keys import hash_of, new_key
from gateway.process import GatewayService
from gateway.settings import GatewaySettings
from moe_core.config.parallel import ParallelConfig
from moe_core.service.peer_roles import PeerRole
from support.certificates import CertificateAuthority
from support.processes import TINY_MODEL

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
UNKNOWN = ("/nothing", "/v1", "/v1/completions/more", "/health/more", "/page/nothing.js")
WITHOUT_KEY = {
    "no key": None,
    "wrong key": "Bearer epserve-wrong",
    "no scheme": "{key}",
    "another scheme": "Basic {key}",
    "empty": "",
    "no key after the scheme": "Bearer",
}


def is_open(path: str) -> bool:
    """What a probe and a browser that has no key yet may see."""
    return path in ("/", "/health", "/ready") or path.startswith("/page/")


@dataclass(frozen=True)
class Secured:
    """A gateway over TLS whose clients need keys, and the application that it serves."""

    app: Starlette
    port: int
    key: str
    trusted: ssl.SSLContext

    @property
    def routes(self) -> list[tuple[str, frozenset[str]]]:
        """Paths, and the methods that each takes."""
        found = []
        for route in self.app.routes:
            assert isinstance(route, Route), f"{route}: what are its paths?"
            path = route.path.replace("{model_id:path}", "tiny_model")
            assert "{" not in path, f"{path}: what would do for its parameters?"
            found.append((path, frozenset(route.methods or ())))
        assert len(found) > 9
        return found

    @asynccontextmanager
    async def client(self, authorization: str | None) -> AsyncIterator[httpx2.AsyncClient]:
        headers = {} if authorization is None else {"authorization": authorization}
        async with httpx2.AsyncClient(
            base_url=f"https://127.0.0.1:{self.port}",
            verify=self.trusted,
            headers=headers,
            timeout=10,
        ) as client:
            yield client


@pytest.fixture
async def secured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Secured]:
    authority, key, apps = CertificateAuthority(), new_key(), []
    key_file = tmp_path / "keys.yaml"
    key_file.write_text(f"- {{name: somebody, hash: '{hash_of(key)}'}}\n")
    make_app = process.make_app

    def noted(*parts: object, **options: object) -> Starlette:
        apps.append(make_app(*parts, **options))
        return apps[0]

    monkeypatch.setattr(process, "make_app", noted)
    settings = GatewaySettings(
        TINY_MODEL,
        "127.0.0.1",
        0,
        ParallelConfig(),
        tls=authority.files(tmp_path / "tls", PeerRole.GATEWAY),
        api_keys=key_file,
    )
    service = GatewayService(settings)
    trusted = ssl.create_default_context(cadata=authority.pem.decode())
    trusted.check_hostname = False  # its certificate is of a role, not of an address
    await service.startup()
    try:
        yield Secured(apps[0], service.http_port, key, trusted)
    finally:
        async with asyncio.timeout(10):
            await service.drain()


@pytest.mark.parametrize("case", WITHOUT_KEY)
async def test_without_a_good_key_every_route_and_method_is_refused(
    secured: Secured, case: str
) -> None:
    shown = WITHOUT_KEY[case]
    authorization = None if shown is None else shown.format(key=secured.key)
    paths = [path for path, _ in secured.routes if not is_open(path)]
    async with secured.client(authorization) as client:
        for path in (*paths, *UNKNOWN):
            for method in METHODS:
                answer = await client.request(method, path)
                assert answer.status_code == 401, (method, path)
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
                assert secured.key not in answer.text


async def test_with_a_key_every_route_takes_its_methods_and_no_other(secured: Secured) -> None:
    async with secured.client(f"Bearer {secured.key}") as client:
        for path, methods in secured.routes:
            for method in METHODS:
                status = (await client.request(method, path)).status_code
                if method in methods:
                    assert status in (200, 400, 503), (method, path)
                else:
                    assert status == 405, (method, path)
        for path in UNKNOWN:
            assert (await client.get(path)).status_code == 404, path


async def test_what_is_open_tells_nothing_of_the_cluster(secured: Secured) -> None:
    async with secured.client(None) as client:
        for path, _ in secured.routes:
            if is_open(path):
                answer = await client.get(path)
                assert answer.status_code in (200, 503), path
                assert "tiny_model" not in answer.text
                assert (await client.post(path)).status_code == 405


async def test_the_port_answers_nobody_in_the_clear(secured: Secured) -> None:
    headers = {"authorization": f"Bearer {secured.key}"}
    base = f"http://127.0.0.1:{secured.port}"
    async with httpx2.AsyncClient(base_url=base, headers=headers, timeout=5) as client:
        for path, _ in secured.routes:
            with pytest.raises(httpx2.TransportError):
                await client.get(path)


async def test_a_client_that_does_not_know_the_ca_does_not_send_its_key(secured: Secured) -> None:
    async with httpx2.AsyncClient(base_url=f"https://127.0.0.1:{secured.port}") as client:
        with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await client.get("/v1/models")
