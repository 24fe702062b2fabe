"""KV blocks of a parked sequence from one group's ranks to another's, over real gRPC and NIXL."""

import asyncio
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest
import torch

from attn_service import group_kv
from attn_service.adoptions import StillWritingError
from attn_service.group_kv import GroupKv
from attn_service.kv_handover import NotKeptError
from attn_service.tensor_parallel import GroupRank
from moe_core.errors import EpserveError, PeerTimeoutError, ProtocolError, UnavailableError
from moe_core.parked_kv import KvSource, ParkedKv
from moe_core.pb.epserve.v1 import attention_pb2 as pb
from moe_core.pb.epserve.v1.attention_pb2_grpc import AttentionServiceStub
from moe_core.transport import handover_client
from support.kv_ranks import BLOCKS, Rank, Ranks, rank_of, renewed, two_groups

THERE = (7, 3, 39, 0, 12, 5, 30)
HERE = (1, 2, 3, 20, 21, 9, 8)
TIMEOUT_S = 5.0


@pytest.fixture(params=["grpc", "nixl"])
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def fetcher(ranks: Ranks, taker: Rank) -> GroupKv:
    group = GroupRank(1, 0, ranks.tp_size)
    return GroupKv(taker.handover, group, 100 + ranks.tp_size, lambda: ranks.state, None)


def park(giver: Rank) -> KvSource:
    blocks = giver.pool.allocate(BLOCKS)
    giver.pool.free([each for each in blocks if each not in THERE])
    giver.parked.keep("s", THERE)
    return KvSource(0, 100, ParkedKv(4 * len(THERE), THERE))


def same(giver: Rank, taker: Rank, first: int = 0) -> bool:
    pairs = zip(giver.read(THERE[first:]), taker.read(HERE[first:]), strict=True)
    return all(torch.equal(there, here) for there, here in pairs)


@pytest.mark.parametrize("tp_size", [1, 2])
async def test_every_rank_gets_its_shard_and_the_blocks_are_freed(
    transport: str, tp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_groups(tp_size, transport) as (ranks, (giving, taking)):
        monkeypatch.setattr(type(taking[0].handover._bytes), "blocks_per_unit", 3)
        source = park(giving[0])
        untouched = [part[4:8].clone() for part in taking[0].cache.parts]
        await fetcher(ranks, taking[0]).fetch("s", source, 0, HERE, TIMEOUT_S)
        assert all(same(*pair) for pair in zip(giving, taking, strict=True))
        assert giving[0].pool.num_free == BLOCKS
        parts = taking[0].cache.parts
        assert all(
            torch.equal(*each) for each in zip(untouched, [p[4:8] for p in parts], strict=True)
        )


async def test_only_what_is_not_there_yet_is_fetched(transport: str) -> None:
    async with two_groups(1, transport) as (ranks, ((giver,), (taker,))):
        before = taker.read(HERE[:5])
        await fetcher(ranks, taker).fetch("s", park(giver), 5, HERE[5:], TIMEOUT_S)
        assert same(giver, taker, 5)
        after = taker.read(HERE[:5])
        assert all(torch.equal(*each) for each in zip(before, after, strict=True))


async def test_blocks_that_were_not_kept_to_the_end_count_for_nothing(transport: str) -> None:
    async with two_groups(1, transport) as (ranks, ((giver,), (taker,))):
        source = park(giver)
        giver.parked.release("s")
        with pytest.raises(NotKeptError, match="dp_rank=0 has not kept the blocks"):
            await fetcher(ranks, taker).fetch("s", source, 0, HERE, TIMEOUT_S)


async def test_a_release_alone_frees_the_blocks() -> None:
    async with two_groups(1, "grpc") as (ranks, ((giver,), (taker,))):
        await fetcher(ranks, taker).release("s", park(giver))
        assert giver.pool.num_free == BLOCKS


async def test_only_members_of_the_cluster_are_asked() -> None:
    async with two_groups(1, "grpc") as (ranks, ((giver,), (taker,))):
        source = park(giver)
        renewed(ranks, 0)
        with pytest.raises(UnavailableError, match="dp_rank=0 is not there now"):
            await fetcher(ranks, taker).fetch("s", source, 0, HERE, TIMEOUT_S)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"block_size": 8}, "block_size=8' there and"),
        ({"fingerprint": "another"}, "model_fingerprint is 'another' there and 'fingerprint'"),
    ],
)
async def test_a_group_that_keeps_blocks_otherwise_is_refused_once(
    other: dict[str, Any], message: str
) -> None:
    ranks = Ranks(1)
    async with (
        rank_of(ranks, 0, 0, "grpc") as giver,
        rank_of(ranks, 1, 0, "grpc", **other) as taker,
    ):
        source = park(giver)
        with pytest.raises(ProtocolError, match=message):
            await fetcher(ranks, taker).fetch("s", source, 0, HERE, TIMEOUT_S)
        with pytest.raises(UnavailableError, match=r"attn 0 .*has failed before"):
            await fetcher(ranks, taker).fetch("s", source, 0, HERE, TIMEOUT_S)


@pytest.mark.parametrize("blocks", [(BLOCKS,), (1 << 31,)])
async def test_a_block_that_does_not_exist_is_refused_by_either_side(
    blocks: tuple[int, ...],
) -> None:
    async with two_groups(1, "grpc") as (ranks, ((giver,), (taker,))):
        park(giver)
        wrong = KvSource(0, 100, ParkedKv(4, blocks))
        with pytest.raises(EpserveError, match=f"KV block {blocks[0]}: there are {BLOCKS}"):
            await fetcher(ranks, taker).fetch("s", wrong, 0, HERE[:1], TIMEOUT_S)
        with pytest.raises(ProtocolError, match=f"KV block {blocks[0]}: there are {BLOCKS}"):
            taker.handover._bytes.restore(*_unit(taker), blocks)


def _unit(rank: Rank) -> tuple[torch.Tensor, bytes]:
    memory = torch.empty(rank.handover._spec.unit_bytes, dtype=torch.uint8)
    return memory, rank.handover._bytes.store((1,), memory)


async def test_damaged_bytes_are_not_taken() -> None:
    async with two_groups(1, "grpc") as (_, ((giver,), (taker,))):
        before = taker.read(HERE)
        memory, digest = _unit(giver)
        memory[0] ^= 1
        with pytest.raises(ProtocolError, match="1 KV blocks came damaged"):
            taker.handover._bytes.restore(memory, digest, HERE[:1])
        assert all(torch.equal(*each) for each in zip(before, taker.read(HERE), strict=True))


async def test_a_group_that_hangs_is_given_up_in_time(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object) -> bytes | None:
        await asyncio.Event().wait()
        return None

    monkeypatch.setattr(handover_client, "FETCH_TIMEOUT_S", 60.0)
    async with two_groups(1, transport) as (ranks, ((giver,), (taker,))):
        giver.handover.servicer._fill = never
        with pytest.raises(PeerTimeoutError, match=r"7 KV blocks took more than 0\.2 s"):
            await fetcher(ranks, taker).fetch("s", park(giver), 0, HERE, 0.2)
        await giver.handover.servicer.close()


async def test_a_rank_that_cannot_fetch_fails_the_whole_group() -> None:
    async with two_groups(2, "grpc") as (ranks, (giving, taking)):
        await giving[1].handover.servicer.close()
        giving[1].servicer._handover = None
        with pytest.raises(UnavailableError, match=r"attn 3 fetches KV blocks: .*attn 1"):
            await fetcher(ranks, taking[0]).fetch("s", park(giving[0]), 0, HERE, TIMEOUT_S)


async def test_a_rank_that_does_not_answer_may_write_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_kv, "ANSWER_S", 0.2)
    async with two_groups(2, "grpc") as (ranks, (giving, taking)):
        ranks.members[3] = replace(ranks.members[3], address="127.0.0.1:1")
        with pytest.raises(StillWritingError, match="attn 3 fetches KV blocks: UNAVAILABLE"):
            await fetcher(ranks, taking[0]).fetch("s", park(giving[0]), 0, HERE, 0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leader_instance_epoch": 5}, "leader_instance_epoch: this rank follows another leader"),
        ({"own_blocks": [1, 2]}, "block_ids: 1, but 2 own_blocks"),
        ({"timeout_ms": 0}, "timeout_ms=0: at most 60000"),
        ({"timeout_ms": 60_001}, "timeout_ms=60001: at most 60000"),
    ],
)
async def test_what_a_leader_would_not_ask_for_is_refused(
    change: dict[str, Any], message: str
) -> None:
    async with two_groups(2, "grpc") as (ranks, _):
        asked: dict[str, Any] = {
            "dp_rank": 0, "instance_epoch": 100, "block_ids": [1], "own_blocks": [2],
            "timeout_ms": 1000, "leader_instance_epoch": 102,
        }  # fmt: skip
        request = pb.FetchBlocksRequest(**asked | change)
        async with grpc.aio.insecure_channel(ranks.members[3].address) as channel:
            stub: Any = AttentionServiceStub(channel)  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.aio.AioRpcError, match=message):
                await stub.FetchBlocks(request)


async def test_a_rank_that_leads_fetches_for_nobody() -> None:
    async with (
        two_groups(1, "grpc") as (ranks, _),
        grpc.aio.insecure_channel(ranks.members[1].address) as channel,
    ):
        stub: Any = AttentionServiceStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.aio.AioRpcError, match="follows nobody"):
            await stub.FetchBlocks(pb.FetchBlocksRequest())
