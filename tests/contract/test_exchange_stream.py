"""What the gRPC stream beside a NIXL link carries: doorbells, and no tensor ever."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import torch

from moe_core.errors import PeerLostError
from moe_core.pb.epserve.v1 import expert_pb2 as pb
from moe_core.transport.base import ExpertLink
from moe_core.transport.nixl_link import NixlLink
from support.exchange_ends import SILENT, SPEC, Expert, answer_to, connect, make_dispatch, serve
from support.exchange_peer import PeerProcess
from support.stream_messages import written_messages

DISPATCHES, LANES = 100, 4


@pytest.fixture
async def expert() -> AsyncIterator[Expert]:
    async with serve(SPEC) as served:
        yield served


async def loaded(link: ExpertLink, count: int = DISPATCHES) -> None:
    """So many dispatches of whole slots, more at a time than there are slots."""

    async def lane(first: int) -> None:
        for step in range(first, count, LANES):
            dispatch = make_dispatch(SPEC.slot_tokens, SPEC, step=step)
            pending = await link.dispatch(dispatch, 5.0)
            assert torch.equal((await pending.wait(5.0)).partial, answer_to(dispatch))
            pending.release()

    await asyncio.gather(*(lane(first) for first in range(LANES)))


@pytest.mark.parametrize("wire", ["grpc", "nixl"])
async def test_a_hundred_loaded_dispatches_write_doorbells_only_where_nixl_carries_them(
    expert: Expert, wire: str
):
    link = await connect(expert.address, SPEC, wire)
    with written_messages() as kinds:
        await loaded(link)
    counted = link.counters.stream_tensor_bytes
    await link.close()
    assert link.counters.dispatches == DISPATCHES
    if wire == "nixl":
        assert set(kinds) <= {"doorbell"}
        assert counted == 0
    else:
        assert kinds == {"dispatch": DISPATCHES, "combine": DISPATCHES}
        rows = DISPATCHES * SPEC.slot_tokens
        assert counted == rows * (2 * SPEC.hidden_size * 4 + SPEC.num_columns * 8)


async def test_whoever_finds_the_peer_asleep_rings():
    with PeerProcess("nixl") as peer:
        link = await connect(peer.address, SPEC, "nixl")
        await loaded(link)
        rung = link.counters.doorbells
        await asyncio.sleep(0.1)
        await loaded(link, 1)
        assert link.counters.doorbells > rung
        assert link.counters.stream_tensor_bytes == 0
        await link.close()


@pytest.mark.parametrize("sender", ["attention", "expert"])
async def test_a_tensor_on_the_stream_of_a_nixl_link_ends_the_exchange(expert: Expert, sender: str):
    link = await connect(expert.address, SPEC, "nixl")
    assert isinstance(link, NixlLink)
    pending = await link.dispatch(make_dispatch(1, SPEC, layer=SILENT), 5.0)
    if sender == "attention":
        link._stream.writer.send(pb.ExchangeRequest(dispatch=pb.DispatchMessage(num_tokens=1)))
        kind = "dispatch"
    else:
        (session,) = expert.servicer.peers
        session._writer.send(pb.ExchangeResponse(combine=pb.CombineMessage(num_tokens=1)))
        kind = "combine"
    with pytest.raises(PeerLostError, match=f"{kind} on the stream of a NIXL link"):
        await pending.wait(5.0)
    await link.close()
