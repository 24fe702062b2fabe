"""Whom an expert process accepts, what it says to the others, and which transport is chosen."""

import dataclasses
import logging
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
import torch

from moe_core.errors import ConfigError, PeerLostError, PeerTimeoutError, ProtocolError
from moe_core.pb.epserve.v1 import expert_pb2 as pb
from moe_core.pb.epserve.v1 import expert_pb2_grpc as rpc
from moe_core.transport import nixl_agent
from moe_core.transport.base import DispatchKey, Identity, LinkSpec, TransportOptions
from moe_core.transport.connect import connect_link
from moe_core.transport.handshake import make_hello
from moe_core.transport.nixl_link import NixlLink
from moe_core.transport.tags import DISPATCH, pack_dispatch
from support.exchange_ends import (
    ATTENTION,
    PEER,
    SILENT,
    SPEC,
    Expert,
    connect,
    make_dispatch,
    serve,
)

KEY = DispatchKey(0, 0, 0)


@pytest.fixture(params=["grpc", "nixl"])
async def wire(request: pytest.FixtureRequest) -> str:
    transport: str = request.param
    return transport


@pytest.fixture
async def expert(wire: str) -> AsyncIterator[Expert]:
    async with serve(SPEC, wire) as served:
        yield served


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_fingerprint": "other"}, "model_fingerprint is 'other' .* 'fingerprint'"),
        ({"dtype": torch.bfloat16}, "dtype is 'bfloat16' .* 'float32'"),
        ({"hidden_size": 32}, "hidden_size is 32 .* 24"),
        ({"num_columns": 2}, "num_columns is 2 .* 3"),
        ({"slot_tokens": 16}, "slot_tokens is 16 .* 8"),
        ({"slot_count": 5}, "slot_count is 5 .* 3"),
    ],
)
async def test_a_spec_that_differs_is_refused_with_both_values(
    wire: str, expert: Expert, change: dict[str, object], message: str
):
    spec: LinkSpec = dataclasses.replace(SPEC, **change)
    with pytest.raises(ProtocolError, match=f"refused.*{message} on the expert side"):
        await connect(expert.address, spec, wire)
    assert expert.servicer.peers == ()


async def test_another_expert_than_the_wanted_one_refuses(wire: str, expert: Expert):
    wanted = Identity(rank=2, world=4, instance_epoch=0)
    with pytest.raises(ProtocolError, match=r"expert rank is 2 .* 1 on the expert side"):
        await connect_link(expert.address, SPEC, ATTENTION, wanted, TransportOptions(wire))


async def test_a_rank_beyond_the_attention_tier_is_refused_whatever_world_it_claims(wire: str):
    async with serve(SPEC, wire, attention_world=lambda: 2) as expert:
        with pytest.raises(ProtocolError, match="rank 7 is not below the 2 attention processes"):
            await connect(expert.address, SPEC, wire, Identity(rank=7, world=8, instance_epoch=1))
        assert expert.servicer.peers == ()
        link = await connect(expert.address, SPEC, wire, Identity(1, 2, 1))
        await link.close()


async def test_another_start_of_the_expert_than_the_wanted_one_is_refused(
    wire: str, expert: Expert
):
    wanted = Identity(rank=1, world=4, instance_epoch=99)
    with pytest.raises(ProtocolError, match="instance 22, and instance 99 was wanted"):
        await connect_link(expert.address, SPEC, ATTENTION, wanted, TransportOptions(wire))


async def test_auto_takes_nixl_where_both_ends_have_it_and_logs_why(
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.INFO)
    async with serve(SPEC, "auto") as expert:
        link = await connect(expert.address, SPEC, "auto")
        assert link.transport == "nixl"
        await link.close()
    assert "transport nixl (both sides have it)" in caplog.text


@pytest.mark.parametrize(("ours", "theirs"), [("auto", "grpc"), ("grpc", "auto")])
async def test_auto_takes_grpc_where_one_end_wants_it(ours: str, theirs: str):
    async with serve(SPEC, theirs) as expert:
        link = await connect(expert.address, SPEC, ours)
        assert link.transport == "grpc"
        await link.close()


async def test_no_transport_in_common_is_refused_with_both_sides_wishes():
    async with serve(SPEC, "grpc") as expert:
        with pytest.raises(ProtocolError, match=r"attention offers \['nixl'\].*use grpc only"):
            await connect(expert.address, SPEC, "nixl")


@pytest.fixture
def _without_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise nixl_agent.NixlUnavailable("nixl does not load: no module of that name")

    monkeypatch.setattr(nixl_agent, "_load", missing)


@pytest.mark.usefixtures("_without_nixl")
async def test_nixl_by_name_is_an_error_where_it_does_not_load():
    with pytest.raises(ConfigError, match=r"transport='nixl': nixl does not load.*auto, grpc"):
        await connect("127.0.0.1:1", SPEC, "nixl")


@pytest.mark.usefixtures("_without_nixl")
async def test_auto_falls_back_to_grpc_where_nixl_does_not_load(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    async with serve(SPEC, "auto") as expert:
        link = await connect(expert.address, SPEC, "auto")
        assert link.transport == "grpc"
        await link.close()
    assert "no module of that name" in caplog.text


async def test_auto_falls_back_to_grpc_where_nixl_does_not_get_through(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("moe_core.transport.connect.PROBE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(NixlLink, "received", lambda link, note: None)
    async with serve(SPEC, "auto") as expert:
        link = await connect(expert.address, SPEC, "auto")
        assert link.transport == "grpc"
        await link.close()
    assert "does not get through" in caplog.text


async def test_nobody_there_ends_at_the_deadline():
    options = TransportOptions("grpc", connect_timeout_s=0.3)
    with pytest.raises(
        (PeerTimeoutError, PeerLostError), match=r"expert 1 .127.0.0.1:1.*handshake"
    ):
        await connect_link("127.0.0.1:1", SPEC, ATTENTION, PEER, options)


class RawClient:
    """Speaks protobuf to an expert as no attention process of ours would."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self.call = rpc.ExpertServiceStub(self._channel).Exchange()

    async def __aenter__(self) -> "RawClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.call.cancel()
        await self._channel.close()

    async def hello(self, hello: pb.Hello) -> None:
        await self.call.write(pb.ExchangeRequest(hello=hello))

    async def end(self) -> tuple[grpc.StatusCode, str]:
        while await self._read():
            pass
        return await self.call.code(), await self.call.details()

    async def _read(self) -> bool:
        try:
            return isinstance(await self.call.read(), pb.ExchangeResponse)
        except grpc.aio.AioRpcError:
            return False


def good_hello() -> pb.Hello:
    return make_hello(SPEC, ATTENTION, PEER, ("grpc",), None)


async def test_no_protocol_version_in_common_is_refused_with_both_lists():
    async with serve(SPEC) as expert, RawClient(expert.address) as client:
        hello = good_hello()
        hello.protocol_versions[:] = [7, 8]
        await client.hello(hello)
        code, details = await client.end()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "attention speaks [7, 8]" in details
    assert "expert speaks [1]" in details


async def test_a_stream_that_does_not_begin_with_a_hello_is_refused():
    async with serve(SPEC) as expert, RawClient(expert.address) as client:
        await client.call.write(pb.ExchangeRequest(doorbell=pb.Doorbell()))
        code, details = await client.end()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "must be a hello" in details


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            pb.DispatchMessage(num_tokens=2**31, hidden_states=b"xx"),
            "2147483648 tokens in a slot of 8",
        ),
        (
            pb.DispatchMessage(num_tokens=2, hidden_states=b"xx"),
            "hidden_states carries 2 bytes where 2 tokens take 192",
        ),
        (pb.DispatchMessage(tag=pb.Tag(slot=77)), "slot 77 of 3"),
    ],
)
async def test_a_dispatch_whose_declared_shape_cannot_be_ends_the_exchange(
    message: pb.DispatchMessage, reason: str
):
    async with serve(SPEC) as expert, RawClient(expert.address) as client:
        await client.hello(good_hello())
        await client.call.write(pb.ExchangeRequest(dispatch=message))
        code, details = await client.end()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert reason in details


@pytest.mark.parametrize(
    ("tag", "reason"),
    [((1, 2**31), "2147483648 tokens in a slot of 8"), ((500, 1), "slot 500 of 3")],
)
async def test_a_nixl_tag_whose_declared_shape_cannot_be_ends_the_exchange(
    tag: tuple[int, int], reason: str
):
    async with serve(SPEC, "nixl") as expert:
        link = await connect(expert.address, SPEC, "nixl")
        assert isinstance(link, NixlLink)
        pending = await link.dispatch(make_dispatch(1, SPEC, layer=SILENT), 5.0)
        slot, num_tokens = tag
        header = (DISPATCH, slot, num_tokens, link._path.link_id, ATTENTION.instance_epoch, 5)
        link._path.write(1, 0, pack_dispatch(header, KEY))
        with pytest.raises(PeerLostError, match=reason):
            await pending.wait(5.0)
        await link.close()


async def test_nixl_tags_of_another_start_or_link_or_an_old_sequence_are_dropped():
    async with serve(SPEC, "nixl") as expert:
        link = await connect(expert.address, SPEC, "nixl")
        assert isinstance(link, NixlLink)
        (session,) = expert.servicer.peers
        epoch, link_id = ATTENTION.instance_epoch, link._path.link_id
        await (await link.dispatch(make_dispatch(1, SPEC), 5.0)).wait(5.0)
        good = session.counters.dispatches
        used = session._arrived.index(1)
        for where in ((link_id, epoch + 1, 9), (link_id ^ 1, epoch, 9), (link_id, epoch, 1)):
            session.received(pack_dispatch((DISPATCH, used, 1, *where), KEY))
        session.received(b"short")
        assert (session.counters.dropped, session.counters.dispatches) == (4, good)
        await link.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slot_bytes", 64),
        ("slot_count", 9),
        ("base_address", 2**64 - 100),
        ("base_address", 4096),
        ("device_id", 2**31),
        ("memory_type", "FILE"),
        ("agent_name", ""),
        ("agent_metadata", b"not metadata"),
    ],
)
async def test_a_grant_of_memory_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, field: str, value: object
):
    from moe_core.transport import connect as module

    def spoiled(*args: object) -> pb.Hello:
        hello = make_hello(*args)
        setattr(hello.nixl, field, value)
        return hello

    monkeypatch.setattr(module, "make_hello", spoiled)
    async with serve(SPEC, "nixl") as expert:
        with pytest.raises(ProtocolError, match="refused"):
            await connect(expert.address, SPEC, "nixl")
        assert expert.servicer.peers == ()
