"""Experts' bytes from one process to another, over each transport."""

import asyncio
import dataclasses

import pytest
import torch

from moe_core.errors import PeerLostError, PeerTimeoutError, ProtocolError, UnavailableError
from moe_core.pb.epserve.v1.expert_pb2 import NixlGrant
from moe_core.service.grpc_channel import RemoteError
from moe_core.transport import handover_client
from moe_core.transport.handover import HandoverSpec, UnitName, digest_of
from moe_core.transport.handover_servicer import MAX_HANDOVERS
from moe_core.transport.host import HostProcess
from moe_core.transport.nixl_path import NixlPath
from support.handover_ends import SPEC, endpoint_of, expert_bytes, fetching, giving


@pytest.fixture(params=["grpc", "nixl"])
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


async def test_every_expert_arrives_whole_with_its_digest(transport: str):
    async with giving(transport) as (address, _), endpoint_of(transport, 1) as endpoint:
        async with fetching(address, transport, endpoint) as fetch:
            assert fetch.transport == transport
            for layer_id, logical in ((1, 3), (2, 0), (1, 7), (1, 3)):
                found = await fetch.fetch(
                    (layer_id, logical), f"expert {logical} of layer {layer_id}"
                )
                assert found is not None
                content, digest = found
                assert torch.equal(content, expert_bytes(layer_id, logical))
                assert digest == digest_of(content)
        if endpoint is not None:
            assert endpoint.retired.num_bytes == 0


async def test_an_expert_that_is_not_held_is_told_and_the_next_one_comes(transport: str):
    async with (
        giving(transport) as (address, _),
        endpoint_of(transport, 1) as endpoint,
        fetching(address, transport, endpoint) as fetch,
    ):
        assert await fetch.fetch((5, 0), "expert 0 of layer 5") is None
        assert await fetch.fetch((1, 8), "expert 8 of layer 1") is None
        found = await fetch.fetch((1, 1), "expert 1 of layer 1")
        assert found is not None
        assert torch.equal(found[0], expert_bytes(1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_fingerprint": "other"}, "model_fingerprint is 'other' there and 'fingerprint'"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16' there and 'float32'"),
        ({"shard_size": 2}, "shard_size is 2 there and 1"),
        ({"unit_bytes": 64}, "unit_bytes is 64 there and 2097164"),
    ],
)
async def test_a_process_that_holds_experts_otherwise_is_refused(
    transport: str, change: dict[str, object], message: str
):
    async with giving(transport) as (address, _), endpoint_of(transport, 1) as endpoint:
        with pytest.raises(ProtocolError, match=f"expert 0 .*{message} here"):
            async with fetching(address, transport, endpoint, dataclasses.replace(SPEC, **change)):
                pass


async def test_a_giver_that_closes_ends_what_is_under_way(transport: str):
    begun = asyncio.Event()

    async def slow(name: UnitName, memory: torch.Tensor) -> bytes | None:
        begun.set()
        await asyncio.Event().wait()
        return None

    async with (
        giving(transport, slow) as (address, servicer),
        endpoint_of(transport, 1) as endpoint,
        fetching(address, transport, endpoint) as fetch,
    ):
        asking = asyncio.create_task(fetch.fetch((1, 1), "expert 1 of layer 1"))
        await begun.wait()
        await servicer.close()
        with pytest.raises(UnavailableError, match=r"expert 0 .*this process is closing"):
            await asking


async def test_a_giver_that_does_not_answer_is_named_and_its_memory_is_held_back(
    transport: str, monkeypatch: pytest.MonkeyPatch
):
    async def never(name: UnitName, memory: torch.Tensor) -> bytes | None:
        await asyncio.Event().wait()
        return None

    monkeypatch.setattr(handover_client, "FETCH_TIMEOUT_S", 0.1)
    async with giving(transport, never) as (address, _), endpoint_of(transport, 1) as endpoint:
        words = "expert 0 .*expert 1 of layer 2, 2097164 bytes, took more than 0.1 s"
        with pytest.raises(PeerTimeoutError, match=words):
            async with fetching(address, transport, endpoint) as fetch:
                await fetch.fetch((2, 1), "expert 1 of layer 2")
        if endpoint is None:
            return
        # The giver, this very process, is alive and may yet write.
        assert endpoint.retired.num_bytes >= SPEC.unit_bytes
        monkeypatch.setattr(HostProcess, "has_exited", lambda process: True)
        endpoint.retired.sweep()
        assert endpoint.retired.num_bytes == 0


@pytest.mark.parametrize("shift", [-4096, 64, 1 << 20])
async def test_memory_that_was_not_registered_is_not_written_to(
    monkeypatch: pytest.MonkeyPatch, shift: int
):
    grant = NixlPath.grant

    def shifted(path: NixlPath) -> NixlGrant:
        message = grant(path)
        message.base_address += shift
        return message

    monkeypatch.setattr(NixlPath, "grant", shifted)
    async with giving("nixl") as (address, _), endpoint_of("nixl", 1) as endpoint:
        with pytest.raises(ProtocolError, match="outside of the memory that it has registered"):
            async with fetching(address, "nixl", endpoint) as fetch:
                await fetch.fetch((1, 3), "expert 3 of layer 1")


async def test_more_handovers_than_allowed_are_refused():
    async with giving("grpc") as (address, _):
        opened = []
        try:
            for _ in range(MAX_HANDOVERS):
                fetch = handover_client.UnitFetch(address, "expert 0", SPEC, None)
                opened.append(fetch)
                await fetch.open(1, ("grpc",), None)
            with pytest.raises(RemoteError, match="8 handovers are under way"):
                async with fetching(address, "grpc", None):
                    pass
        finally:
            for fetch in opened:
                await fetch.close()


async def test_a_giver_that_is_not_there_is_lost(transport: str):
    async with endpoint_of(transport, 1) as endpoint:
        with pytest.raises((PeerLostError, UnavailableError), match=r"expert 0 .127\.0\.0\.1:1"):
            async with fetching("127.0.0.1:1", transport, endpoint):
                pass


async def test_no_transport_in_common_is_refused():
    async with giving("grpc") as (address, _), endpoint_of("nixl", 1) as endpoint:
        with pytest.raises(ProtocolError, match=r"no transport in common: \['nixl'\] is offered"):
            async with fetching(address, "nixl", endpoint):
                pass


async def test_bytes_that_are_too_few_are_refused():
    """By a giver that reckons with smaller pieces than it has."""

    class Short(HandoverSpec):
        def pieces(self) -> list[tuple[int, int]]:
            return [(0, 1000)]

    short = Short(*dataclasses.astuple(SPEC))
    async with giving("grpc", spec=short) as (address, _), fetching(address, "grpc", None) as fetch:
        with pytest.raises(ProtocolError, match=r"expert 0 .*sent 1000 of 2097164 bytes"):
            await fetch.fetch((1, 1), "expert 1 of layer 1")
