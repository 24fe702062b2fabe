"""What a peer may name, beyond which nothing is written or opened, and links over TLS."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_core.errors import PeerLostError, ProtocolError
from moe_core.pb.epserve.v1 import expert_pb2 as pb
from moe_core.service.certificates import Certificates
from moe_core.service.peer_roles import PeerRole
from moe_core.transport import connect as module
from moe_core.transport.base import TransportOptions
from moe_core.transport.connect import connect_link
from moe_core.transport.handshake import make_hello
from moe_core.transport.servicer import ExchangeServicer
from support.certificates import CertificateAuthority
from support.exchange_ends import ATTENTION, PEER, SPEC, connect, make_dispatch, serve

Spoil = Callable[[Callable[[pb.NixlGrant], None]], None]


@pytest.fixture
def spoil_grants(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Changes what every attention process of this test grants from then on."""

    def spoil_with(change: Callable[[pb.NixlGrant], None]) -> None:
        def spoiled(*args: object) -> pb.Hello:
            hello = make_hello(*args)
            change(hello.nixl)
            return hello

        monkeypatch.setattr(module, "make_hello", spoiled)

    return spoil_with


@pytest.mark.parametrize("shift", [-4096, 64, 1 << 20])
async def test_a_grant_beyond_what_was_registered_is_refused_before_a_write(
    spoil_grants: Spoil, shift: int
):
    def shifted(grant: pb.NixlGrant) -> None:
        grant.base_address += shift

    spoil_grants(shifted)
    async with serve(SPEC, "nixl") as expert:
        with pytest.raises(ProtocolError, match="outside of the memory that it has registered"):
            await connect(expert.address, SPEC, "nixl")
        assert expert.servicer.peers == ()


@pytest.mark.parametrize("shift", [-4096, 64, 1 << 20])
async def test_an_expert_process_that_grants_what_it_has_not_registered_is_not_written_to(
    monkeypatch: pytest.MonkeyPatch, shift: int
):
    welcome = ExchangeServicer._welcome

    def shifted(*args: object) -> pb.Welcome:
        message = welcome(*args)
        message.nixl.base_address += shift
        return message

    monkeypatch.setattr(ExchangeServicer, "_welcome", shifted)
    async with serve(SPEC, "nixl") as expert:
        with pytest.raises(ProtocolError, match=r"expert 1 .*outside of the memory that it has"):
            await connect(expert.address, SPEC, "nixl")


@pytest.mark.parametrize("doorbell", ["x" * 200, "glocke\u00e4"])
async def test_a_doorbell_that_cannot_be_rung_is_refused(spoil_grants: Spoil, doorbell: str):
    def spoiled(grant: pb.NixlGrant) -> None:
        grant.process.doorbell = doorbell

    spoil_grants(spoiled)
    async with serve(SPEC, "nixl") as expert:
        with pytest.raises(ProtocolError, match="doorbell="):
            await connect(expert.address, SPEC, "nixl")


async def test_a_flag_that_is_a_pipe_neither_blocks_nor_counts(spoil_grants: Spoil):
    reading, writing = os.pipe()

    def spoiled(grant: pb.NixlGrant) -> None:
        grant.process.parked_fd = reading

    spoil_grants(spoiled)
    async with serve(SPEC, "nixl") as expert:
        link = await connect(expert.address, SPEC, "nixl")
        pending = await link.dispatch(make_dispatch(1, SPEC), 5.0)
        await pending.wait(5.0)
        pending.release()
        await link.close()
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("wire", ["grpc", "nixl"])
async def test_both_wires_work_over_tls_for_an_attention_process_alone(wire: str, tmp_path: Path):
    authority = CertificateAuthority()

    def certificates(role: PeerRole) -> Certificates:
        return Certificates(authority.files(tmp_path / role, role), role)

    own = certificates(PeerRole.EXPERT)
    async with serve(SPEC, wire, tls=own) as expert:
        options = TransportOptions(wire, connect_timeout_s=3.0)
        attention = certificates(PeerRole.ATTN)
        link = await connect_link(expert.address, SPEC, ATTENTION, PEER, options, tls=attention)
        pending = await link.dispatch(make_dispatch(2, SPEC), 5.0)
        assert (await pending.wait(5.0)).partial.shape == (2, SPEC.hidden_size)
        pending.release()
        await link.close()
        with pytest.raises(PeerLostError, match="PERMISSION_DENIED"):
            await connect_link(expert.address, SPEC, ATTENTION, PEER, options, tls=own)
