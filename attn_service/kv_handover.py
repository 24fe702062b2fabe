"""Both ends of this rank's KV hand-overs: giving what its group has parked, and fetching from the
same rank of another group.

Knows this rank's cache as bytes, which wire may be asked for, and the members of the cluster: no
other process is asked. Knows no sequence but by its id, and not why it moves.
"""

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Many

from torch import Tensor

from attn_service.kv_bytes import KvBlockBytes
from attn_service.tensor_parallel import GroupRank
from moe_core.cluster import ClusterState, Member, Role
from moe_core.errors import EpserveError, PeerTimeoutError, UnavailableError
from moe_core.model.kv_cache import KvCache
from moe_core.parked_kv import KvSource
from moe_core.service.certificates import Certificates, expecting
from moe_core.service.peer_roles import PeerRole
from moe_core.transport.base import Identity, TransportOptions
from moe_core.transport.choice import offered_transports
from moe_core.transport.endpoint import NixlEndpoint
from moe_core.transport.handover import UnitName
from moe_core.transport.handover_client import UnitFetch
from moe_core.transport.handover_servicer import HandoverServicer, Release

MAX_TAKERS = 256  # other groups, of which each has some of the sequences
IDLE_S = 2.0  # several sequences come one after the other, over one stream


class NotKeptError(EpserveError):
    """The other group has used the blocks for something else meanwhile."""


class KvHandover:
    """`endpoint` is this process's one, for all its links; None: everything goes by grpc. On
    tp_rank 0 of a group `lead` has to be called."""

    def __init__(
        self,
        cache: KvCache,
        model_fingerprint: str,
        identity: Identity,
        group: GroupRank,
        options: TransportOptions,
        endpoint: NixlEndpoint | None,
        tls: Certificates | None,
        state: Callable[[], ClusterState],
    ) -> None:
        self._bytes = KvBlockBytes(cache)
        self._spec = self._bytes.spec(model_fingerprint, group.tp_rank, group.tp_size)
        self._identity = identity
        self._group = group
        self._transports = offered_transports(options, endpoint)
        self._endpoint = endpoint
        self._tls = tls
        self._state = state
        self._release: Release | None = None
        self._fetches: dict[int, UnitFetch] = {}  # by the giver's instance epoch
        self._failed: set[int] = set()
        self._resting: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._lock = asyncio.Lock()
        self._closed = False
        self.servicer = HandoverServicer(
            self._spec,
            self._fill,
            identity.instance_epoch,
            endpoint,
            self._released,
            MAX_TAKERS,
        )

    def lead(self, release: Release) -> None:
        """This rank's group frees its parked blocks by `release`."""
        self._release = release

    async def copy(
        self, source: KvSource, there: Many[int], here: Many[int], timeout_s: float
    ) -> None:
        """Fill the blocks `here` with those of `source` that `there` names. Nothing is written
        after `timeout_s`, or once this has ended. Raises EpserveError where not all are filled."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        peer = self._peer(source)
        size = self._bytes.blocks_per_unit
        try:
            async with asyncio.timeout_at(deadline), self._lock:
                fetch = await self._fetch_from(peer)
                for first in range(0, len(there), size):
                    await self._unit(
                        fetch, there[first : first + size], here[first : first + size], deadline
                    )
        except BaseException as error:
            self._give_up(peer)
            if isinstance(error, TimeoutError):
                raise PeerTimeoutError(
                    f"{_name(peer)}: {len(there)} KV blocks took more than "
                    f"{timeout_s:g} s, phase: network"
                ) from None
            raise

    async def release(self, sequence_id: str, source: KvSource) -> bool:
        """Whether the group kept the sequence's blocks until now. Raises EpserveError."""
        peer = self._peer(source)
        async with self._lock:
            try:
                return await (await self._fetch_from(peer)).release(sequence_id)
            except BaseException:
                self._give_up(peer)
                raise

    async def close(self) -> None:
        """End what is given and what is fetched."""
        self._closed = True
        await self.servicer.close()
        if self._resting is not None:
            self._resting.cancel()
        self._close_all()
        if self._closing:
            await asyncio.wait(self._closing)

    async def _unit(
        self, fetch: UnitFetch, there: Many[int], here: Many[int], deadline: float
    ) -> None:
        found = await fetch.fetch(tuple(there), f"{len(there)} KV blocks")
        if found is None:
            raise NotKeptError(f"{fetch.peer} does not hold KV blocks {list(there)}")
        if asyncio.get_running_loop().time() > deadline:
            raise TimeoutError  # this process was away for longer than its leader waits
        self._bytes.restore(*found, here)

    def _peer(self, source: KvSource) -> Member:
        """The rank of the group that has what this rank needs, as the cluster knows it."""
        tier = [each for each in self._state().tier(Role.ATTN) if each.dp_rank == source.dp_rank]
        by_rank = {member.tp_rank: member for member in tier}
        leader, peer = by_rank.get(0), by_rank.get(self._group.tp_rank)
        if leader is None or leader.instance_epoch != source.instance_epoch or peer is None:
            raise UnavailableError(f"attention group dp_rank={source.dp_rank} is not there now")
        if peer.instance_epoch in self._failed:
            raise UnavailableError(f"{_name(peer)} has failed before")
        return peer

    async def _fetch_from(self, peer: Member) -> UnitFetch:
        """After an error the caller gives up the peer."""
        if self._closed:
            raise UnavailableError("this attention process is closing")
        self._rest_later()
        fetch = self._fetches.get(peer.instance_epoch)
        if fetch is not None:
            return fetch
        security = expecting(self._tls, PeerRole.ATTN)
        fetch = self._fetches[peer.instance_epoch] = UnitFetch(
            peer.address, _name(peer), self._spec, security
        )
        await fetch.open(self._identity.rank, self._transports, self._endpoint)
        return fetch

    def _give_up(self, peer: Member) -> None:
        """It is not asked again: who waits for it had better compute."""
        self._failed.add(peer.instance_epoch)
        fetch = self._fetches.pop(peer.instance_epoch, None)
        if fetch is not None:
            self._close(fetch)

    def _rest_later(self) -> None:
        if self._resting is not None:
            self._resting.cancel()
        self._resting = asyncio.get_running_loop().call_later(IDLE_S, self._rest)

    def _rest(self) -> None:
        """Close what is open, unless it is in use."""
        if self._lock.locked():
            self._rest_later()
        else:
            self._close_all()

    def _close_all(self) -> None:
        while self._fetches:
            self._close(self._fetches.popitem()[1])

    def _close(self, fetch: UnitFetch) -> None:
        closing = asyncio.create_task(fetch.close(), name="close handover")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _fill(self, name: UnitName, memory: Tensor) -> bytes | None:
        """A FillUnit; whether the blocks were kept, the release says."""
        return self._bytes.store(name, memory)

    def _released(self, sequence_id: str) -> bool:
        return self._release is not None and self._release(sequence_id)


def _name(peer: Member) -> str:
    return f"attn {peer.rank} ({peer.address})"
