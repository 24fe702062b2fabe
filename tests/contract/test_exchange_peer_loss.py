"""What becomes of a link when the process at its other end dies, freezes or comes back."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest
import torch

from moe_core.errors import PeerLostError, PeerTimeoutError, TransportError
from moe_core.transport.base import ExpertLink, Identity, TransportOptions
from moe_core.transport.choice import open_endpoint
from moe_core.transport.connect import connect_link
from moe_core.transport.grpc_link import GrpcLink
from moe_core.transport.nixl_link import NixlLink
from support.exchange_ends import (
    ATTENTION,
    FREEZE,
    PEER,
    SILENT,
    SPEC,
    answer_to,
    connect,
    make_dispatch,
    serve,
    until,
)
from support.exchange_peer import PeerProcess

SOON_S = 1.0


@pytest.fixture(params=["grpc", "nixl"])
def wire(request: pytest.FixtureRequest) -> str:
    transport: str = request.param
    return transport


@pytest.fixture
def peer(wire: str) -> Iterator[PeerProcess]:
    with PeerProcess(wire) as process:
        yield process


async def round_trips(link: ExpertLink, count: int, num_tokens: int = 8) -> None:
    for step in range(count):
        dispatch = make_dispatch(num_tokens, SPEC, step=step)
        pending = await link.dispatch(dispatch, 5.0)
        assert torch.equal((await pending.wait(5.0)).partial, answer_to(dispatch))
        pending.release()


async def test_a_killed_peer_fails_everything_outstanding_soon(wire: str, peer: PeerProcess):
    link = await connect(peer.address, SPEC, wire)
    pending = [
        await link.dispatch(make_dispatch(4, SPEC, layer=SILENT), 5.0)
        for _ in range(SPEC.slot_count)
    ]
    waits = [asyncio.create_task(one.wait(30.0)) for one in pending]
    queued = asyncio.create_task(link.dispatch(make_dispatch(4, SPEC), 30.0))
    await asyncio.sleep(0.05)
    killed = time.monotonic()
    peer.kill()
    results = await asyncio.gather(*waits, queued, return_exceptions=True)
    assert time.monotonic() - killed < SOON_S
    assert all(isinstance(result, PeerLostError) for result in results)
    assert all("layer 2, 4 tokens, 384 bytes" in str(result) for result in results[:-1])
    with pytest.raises(PeerLostError, match="is gone"):
        await link.dispatch(make_dispatch(1, SPEC), 5.0)
    await link.close()


async def test_a_frozen_peer_costs_a_deadline_and_its_late_answer_is_dropped(
    wire: str, peer: PeerProcess
):
    link = await connect(peer.address, SPEC, wire)
    await round_trips(link, 1)
    os.kill(peer.process.pid, signal.SIGSTOP)
    try:
        pending = await link.dispatch(make_dispatch(4, SPEC), 5.0)
        with pytest.raises(PeerTimeoutError):
            await pending.wait(0.2)
    finally:
        os.kill(peer.process.pid, signal.SIGCONT)
    await until(lambda: link.counters.dropped == 1)
    await round_trips(link, 2 * SPEC.slot_count)
    await link.close()


async def test_a_peer_that_is_given_up_fails_all_at_once_and_its_late_answers_are_dropped(
    wire: str, peer: PeerProcess
):
    link = await connect(peer.address, SPEC, wire)
    await round_trips(link, 1)
    os.kill(peer.process.pid, signal.SIGSTOP)
    try:
        pending = [await link.dispatch(make_dispatch(4, SPEC), 5.0) for _ in range(SPEC.slot_count)]
        waits = [asyncio.create_task(one.wait(30.0)) for one in pending]
        queued = asyncio.create_task(link.dispatch(make_dispatch(4, SPEC), 30.0))
        await asyncio.sleep(0.05)
        link.lose("no lease for 3 s")
        async with asyncio.timeout(SOON_S):
            results = await asyncio.gather(*waits, queued, return_exceptions=True)
        assert all(isinstance(result, PeerLostError) for result in results)
        assert all("is gone (no lease for 3 s)" in str(result) for result in results)
        for one in pending:
            one.release()
        with pytest.raises(PeerLostError, match="no lease"):
            await link.dispatch(make_dispatch(1, SPEC), 5.0)
    finally:
        os.kill(peer.process.pid, signal.SIGCONT)
    await until(lambda: link.counters.dropped == SPEC.slot_count)
    await link.close()


async def test_a_peer_restarted_at_the_same_address_is_met_anew(wire: str, peer: PeerProcess):
    endpoint, _ = open_endpoint(ATTENTION, TransportOptions(wire))
    options = TransportOptions(wire)

    async def meet(epoch: int) -> ExpertLink:
        wanted = Identity(PEER.rank, PEER.world, epoch)
        return await connect_link(peer.address, SPEC, ATTENTION, wanted, options, endpoint)

    link = await meet(22)
    await round_trips(link, 3)
    pending = await link.dispatch(make_dispatch(4, SPEC, layer=SILENT), 5.0)
    peer.kill()
    with pytest.raises(PeerLostError):
        await pending.wait(5.0)
    await link.close()
    with PeerProcess(wire, port=peer.port, epoch=23):
        again = await meet(23)
        await round_trips(again, 3)
        await again.close()
    if endpoint is not None:
        endpoint.retired.sweep()
        assert endpoint.retired.num_bytes == 0
        endpoint.close()


async def test_a_restarted_attention_process_takes_the_place_of_its_former_self(wire: str):
    async with serve(SPEC, wire) as expert:
        old = await connect(expert.address, SPEC, wire)
        pending = await old.dispatch(make_dispatch(4, SPEC, layer=SILENT), 5.0)
        new = await connect(expert.address, SPEC, wire, Identity(0, 4, 12))
        with pytest.raises(PeerLostError, match="replaced by instance 12"):
            await pending.wait(5.0)
        await round_trips(new, 3)
        assert len(expert.servicer.peers) == 1
        await old.close()
        await new.close()


async def test_a_closing_expert_says_so(wire: str):
    async with serve(SPEC, wire) as expert:
        link = await connect(expert.address, SPEC, wire)
        pending = await link.dispatch(make_dispatch(4, SPEC, layer=SILENT), 5.0)
        await expert.servicer.close()
        with pytest.raises(PeerLostError, match="expert 1 is closing"):
            await pending.wait(5.0)
        await link.close()


async def test_a_peer_that_leaves_while_the_expert_closes_does_not_hold_it_up(wire: str):
    async with serve(SPEC, wire) as expert:
        link = await connect(expert.address, SPEC, wire)
        assert isinstance(link, NixlLink | GrpcLink)
        link._stream._call.cancel()
        async with asyncio.timeout(SOON_S):
            await expert.servicer.close()
        await link.close()


async def test_memory_that_a_living_peer_may_still_write_is_kept_and_the_budget_refuses_by_name():
    options = TransportOptions("nixl", retired_bytes=4096)
    endpoint, _ = open_endpoint(ATTENTION, options)
    assert endpoint is not None
    with PeerProcess("nixl") as peer:
        link = await connect_link(peer.address, SPEC, ATTENTION, PEER, options, endpoint)
        os.kill(peer.process.pid, signal.SIGSTOP)
        await link.close()  # the peer does not confirm that it writes no more
        assert endpoint.retired.num_bytes > 0
        with pytest.raises(TransportError, match=rf"expert 1.*held back.*{peer.address}.*=4096"):
            await connect_link(peer.address, SPEC, ATTENTION, PEER, options, endpoint)
        peer.kill()
    endpoint.retired.sweep()
    assert endpoint.retired.num_bytes == 0
    endpoint.close()


async def test_a_peer_that_does_not_answer_a_question_either_is_said_to_compute(wire: str):
    with PeerProcess(wire) as peer:
        link = await connect(peer.address, SPEC, wire)
        pending = await link.dispatch(make_dispatch(4, SPEC, layer=FREEZE), 5.0)
        with pytest.raises(PeerTimeoutError, match=r"layer 5, 4 tokens, \d+ bytes, phase: compute"):
            await pending.wait(0.1)
        await link.close()


async def test_what_a_frozen_peer_writes_when_it_thaws_lands_in_retired_memory_alone():
    options, dispatch = TransportOptions("nixl"), make_dispatch(4, SPEC, layer=FREEZE)
    endpoint, _ = open_endpoint(ATTENTION, options)
    assert endpoint is not None
    with PeerProcess("nixl") as frozen, PeerProcess("nixl", epoch=23) as successor:
        old = await connect_link(frozen.address, SPEC, ATTENTION, PEER, options, endpoint)
        assert isinstance(old, NixlLink)
        pending = await old.dispatch(dispatch, 5.0)
        await until(lambda: is_stopped(frozen))
        old.lose("no lease for 3 s")
        await old.close()
        retired, before = endpoint.retired.num_bytes, old._path.incoming.clone()
        assert retired >= before.numel() > 0
        new = await connect_link(successor.address, SPEC, ATTENTION, PEER, options, endpoint)
        assert isinstance(new, NixlLink)
        work = [make_dispatch(8, SPEC, step=step) for step in range(SPEC.slot_count)]
        held = [await (await new.dispatch(each, 5.0)).wait(5.0) for each in work]
        memory = new._path.incoming.clone()
        os.kill(frozen.process.pid, signal.SIGCONT)
        late = old._in.payload(pending.slot, 4)
        await until(lambda: torch.equal(late, answer_to(dispatch)))
        assert not torch.equal(old._path.incoming, before)
        # Nothing of it reaches whoever has the place now, whose answers all lie in their slots.
        assert torch.equal(new._path.incoming, memory)
        for each, combine in zip(work, held, strict=True):
            assert torch.equal(combine.partial, answer_to(each))
        endpoint.retired.sweep()
        assert endpoint.retired.num_bytes == retired
        frozen.kill()
        endpoint.retired.sweep()
        assert endpoint.retired.num_bytes == 0
        await new.close()
    endpoint.close()


def is_stopped(peer: PeerProcess) -> bool:
    return psutil.Process(peer.process.pid).status() == psutil.STATUS_STOPPED


async def test_an_exchange_that_ends_in_order_gives_its_memory_back():
    endpoint, _ = open_endpoint(ATTENTION, TransportOptions("nixl"))
    assert endpoint is not None
    async with serve(SPEC, "nixl") as expert:
        options = TransportOptions("nixl")
        link = await connect_link(expert.address, SPEC, ATTENTION, PEER, options, endpoint)
        await round_trips(link, 3)
        await link.close()
        assert endpoint.retired.num_bytes == 0
        await until(lambda: expert.servicer.peers == ())
        assert expert.servicer.retired_bytes == 0
    endpoint.close()
