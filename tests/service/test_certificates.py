"""Certificates that are replaced while servers run, and those that cannot be used."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moe_core.errors import ConfigError
from moe_core.service.certificates import Certificates, ServerCheck
from moe_core.service.grpc_channel import open_channel
from moe_core.service.grpc_host import GrpcHost
from moe_core.service.peer_roles import PeerRole
from moe_core.service.tls_files import TlsFiles
from support.certificates import CertificateAuthority, write_files

GATEWAY, ATTN, EXPERT = PeerRole.GATEWAY, PeerRole.ATTN, PeerRole.EXPERT
SERVING = health_pb2.HealthCheckResponse.SERVING


@dataclass
class Served:
    authority: CertificateAuthority
    host: GrpcHost
    files: TlsFiles
    port: int

    async def shown(self) -> str:
        """The certificate that a new connection is shown."""
        return await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", self.port))

    def replace(self, certificate: bytes) -> None:
        assert self.files.cert is not None
        draft = self.files.cert.with_suffix(".draft")
        draft.write_bytes(certificate)
        draft.replace(self.files.cert)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    authority = CertificateAuthority()
    files = authority.files(tmp_path / "server", GATEWAY)
    host = GrpcHost(Certificates(files, GATEWAY))
    port = await host.start("127.0.0.1", 0, cluster_port=0)
    yield Served(authority, host, files, port)
    await host.stop(0)


async def test_new_connections_see_a_new_certificate_and_old_streams_live_on(
    served: Served, tmp_path: Path
) -> None:
    own = Certificates(served.authority.files(tmp_path / "client", ATTN), ATTN)
    address = f"127.0.0.1:{served.host.cluster_port}"
    async with open_channel(address, ServerCheck(own, GATEWAY)) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        statuses = aiter(stub.Watch(health_pb2.HealthCheckRequest(), timeout=20))
        await anext(statuses)
        before = await served.shown()
        write_files(tmp_path / "server", served.authority.pem, served.authority.issue(GATEWAY))
        after = await served.shown()
        assert after != before
        assert after.strip() == served.files.cert.read_text().strip()
        served.host.set_ready(True)
        assert (await anext(statuses)).status == SERVING
    async with open_channel(address, ServerCheck(own, GATEWAY)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status == SERVING


async def test_a_new_ca_is_believed_from_the_next_connection_on(
    served: Served, tmp_path: Path
) -> None:
    other = CertificateAuthority()
    own = Certificates(other.files(tmp_path / "client", ATTN), ATTN)
    write_files(tmp_path / "server", other.pem, other.issue(GATEWAY))
    address = f"127.0.0.1:{served.host.cluster_port}"
    async with open_channel(address, ServerCheck(own, GATEWAY)) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)


@pytest.mark.parametrize("spoiled", ["no PEM", "another key's", "expired", "another role's"])
async def test_certificate_that_cannot_be_used_leaves_the_old_one(
    served: Served, spoiled: str
) -> None:
    before = await served.shown()
    expired = served.authority.issue(GATEWAY, lives=timedelta(minutes=-1))
    contents = {
        "no PEM": b"half of a file",
        "another key's": served.authority.issue(GATEWAY).certificate,
        "expired": expired.certificate,
        "another role's": served.authority.issue(EXPERT).certificate,
    }
    served.replace(contents[spoiled])
    assert await served.shown() == before
    served.replace(before.encode())
    assert await served.shown() == before


def test_channels_opened_anew_show_the_new_certificate(tmp_path: Path) -> None:
    authority = CertificateAuthority()
    own = Certificates(authority.files(tmp_path, ATTN), ATTN)
    before = own.current()
    assert own.current() is before
    write_files(tmp_path, authority.pem, authority.issue(ATTN))
    assert own.current() != before


def test_what_cannot_be_used_is_refused_by_the_name_of_its_setting(tmp_path: Path) -> None:
    authority = CertificateAuthority()
    good = authority.files(tmp_path / "good", ATTN)
    other = authority.files(tmp_path / "other", ATTN)
    late = write_files(
        tmp_path / "late", authority.pem, authority.issue(ATTN, lives=timedelta(minutes=-1))
    )
    nothing = tmp_path / "nothing"
    nothing.write_text("nothing")
    for files, setting, rule in (
        (TlsFiles(good.ca, good.cert, other.key), "tls_key", "is not the key of"),
        (TlsFiles(good.ca, good.cert, nothing), "tls_key", "holds no PEM private key"),
        (TlsFiles(good.ca, nothing, good.key), "tls_cert", "holds no PEM certificate"),
        (TlsFiles(nothing, good.cert, good.key), "tls_ca", "holds no PEM certificate"),
        (TlsFiles(tmp_path / "gone", good.cert, good.key), "tls_ca", "No such file"),
        (late, "tls_cert", "has expired"),
    ):
        with pytest.raises(ConfigError, match=rule) as caught:
            Certificates(files, ATTN)
        assert caught.value.setting == setting
    with pytest.raises(ConfigError, match=r"epserve://expert with expert\.epserve"):
        Certificates(good, ATTN, EXPERT)
