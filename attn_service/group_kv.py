"""A group's KvFetcher: each of its ranks fetches its own shard, and none knows a sequence's blocks
before all have theirs.

Knows the group's ranks and how tp_rank 0 asks the others. Knows no cache and no wire.
"""

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Any

import grpc
import grpc.aio

from attn_service.adoptions import StillWritingError
from attn_service.kv_handover import KvHandover, NotKeptError
from attn_service.tensor_parallel import GroupRank
from moe_core.cluster import ClusterState, Member, Role
from moe_core.errors import EpserveError, RequestError, UnavailableError
from moe_core.parked_kv import KvSource, ParkedKv
from moe_core.pb.epserve.v1 import attention_pb2 as pb
from moe_core.pb.epserve.v1.attention_pb2_grpc import AttentionServiceStub
from moe_core.service.certificates import Certificates, expecting
from moe_core.service.grpc_channel import error_from_rpc, open_channel
from moe_core.service.peer_roles import PeerRole

ANSWER_S = 1.0  # for what a rank answers when its time is up
MAX_FETCH_S = 60.0
REFUSALS = (
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
)


class GroupKv:
    """A KvFetcher on tp_rank 0; see adoptions.py."""

    def __init__(
        self,
        handover: KvHandover,
        group: GroupRank,
        instance_epoch: int,
        state: Callable[[], ClusterState],
        tls: Certificates | None,
    ) -> None:
        self._handover = handover
        self._group = group
        self._instance_epoch = instance_epoch
        self._state = state
        self._security = expecting(tls, PeerRole.ATTN)

    async def fetch(
        self, sequence_id: str, source: KvSource, first: int, blocks: Many[int], timeout_s: float
    ) -> None:
        """See KvFetcher."""
        there = source.parked.block_ids[first : first + len(blocks)]
        others = [
            self._ask(member, source, there, blocks, timeout_s) for member in self._followers()
        ]
        outcomes = await asyncio.gather(
            self._handover.copy(source, there, blocks, timeout_s), *others, return_exceptions=True
        )
        failures = [each for each in outcomes if isinstance(each, BaseException)]
        for failure in sorted(failures, key=lambda each: not isinstance(each, StillWritingError)):
            raise failure
        if not await self._handover.release(sequence_id, source):
            raise NotKeptError(
                f"attention group dp_rank={source.dp_rank} has not kept the blocks for so long"
            )

    async def release(self, sequence_id: str, source: KvSource) -> None:
        """See KvFetcher."""
        await self._handover.release(sequence_id, source)

    def _followers(self) -> list[Member]:
        """Raises UnavailableError where one of the group is not there."""
        tier = self._state().tier(Role.ATTN)
        own = [each for each in tier if each.dp_rank == self._group.dp_rank and each.tp_rank]
        if len(own) != self._group.tp_size - 1:
            raise UnavailableError(f"{self._group}: {len(own)} other ranks are there")
        return own

    async def _ask(
        self,
        member: Member,
        source: KvSource,
        there: Many[int],
        blocks: Many[int],
        timeout_s: float,
    ) -> None:
        """Raises StillWritingError where that rank does not say that it has ended."""
        request = pb.FetchBlocksRequest(
            dp_rank=source.dp_rank,
            instance_epoch=source.instance_epoch,
            block_ids=there,
            own_blocks=blocks,
            timeout_ms=int(timeout_s * 1000),
            leader_instance_epoch=self._instance_epoch,
        )
        doing = f"attn {member.rank} fetches KV blocks"
        channel = open_channel(member.address, self._security)
        try:
            stub: Any = AttentionServiceStub(channel)  # type: ignore[no-untyped-call]  # generated
            answer = await stub.FetchBlocks(request, timeout=timeout_s + ANSWER_S)
        except grpc.aio.AioRpcError as error:
            if error.code() in REFUSALS:
                raise error_from_rpc(error, doing) from error
            raise StillWritingError(f"{doing}: {error.code().name}: {error.details()}") from error
        finally:
            await channel.close(None)
        if answer.error:
            raise UnavailableError(f"{doing}: {answer.error}")


async def fetch_blocks(handover: KvHandover, leader_instance_epoch: int, request: Any) -> Any:  # noqa: ANN401
    """FetchBlocks, on a rank that follows the tp_rank 0 of that instance epoch. Raises
    RequestError."""
    if request.leader_instance_epoch != leader_instance_epoch:
        raise RequestError("leader_instance_epoch: this rank follows another leader")
    if len(request.block_ids) != len(request.own_blocks):
        raise RequestError(
            f"block_ids: {len(request.block_ids)}, but {len(request.own_blocks)} own_blocks"
        )
    timeout_s = request.timeout_ms / 1000
    if not 0 < timeout_s <= MAX_FETCH_S:
        raise RequestError(f"timeout_ms={request.timeout_ms}: at most {1000 * MAX_FETCH_S:g}")
    there, here = tuple(request.block_ids), tuple(request.own_blocks)
    source = KvSource(request.dp_rank, request.instance_epoch, ParkedKv(0, there))
    try:
        await handover.copy(source, there, here, timeout_s)
    except EpserveError as error:
        return pb.FetchBlocksResponse(error=str(error))
    return pb.FetchBlocksResponse()
