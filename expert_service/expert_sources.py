"""Where a process gets an expert from that it does not hold yet: from a peer, else from disk.

Knows the checkpoint, the peers that the cluster's state names, and what to do when one of them
fails. Knows no wire, and nothing of why an expert is wanted.
"""

from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog
import torch

from expert_service.expert_bytes import ExpertForm
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.expert_loader import ExpertShard, load_expert
from moe_core.cluster import ClusterState, Member, MemberState, Role
from moe_core.errors import EpserveError
from moe_core.model.weights import ExpertWeights
from moe_core.service.own_thread import in_own_thread
from moe_core.transport.handover import UnitName

log = structlog.get_logger(__name__)


class Fetch(Protocol):
    """See UnitFetch."""

    transport: str

    async def fetch(self, name: UnitName, what: str) -> tuple[torch.Tensor, bytes] | None: ...

    async def close(self) -> None: ...


Connect = Callable[[Member], Awaitable[Fetch]]
"""Opens a fetch from a peer. Raises EpserveError."""


class DiskSource:
    """An ExpertSource that reads the checkpoint."""

    def __init__(self, checkpoint: Checkpoint, shard: ExpertShard) -> None:
        self._checkpoint = checkpoint
        self._shard = shard

    async def expert(self, layer_id: int, logical: int, state: ClusterState) -> ExpertWeights:
        """Raises CheckpointError."""
        return await in_own_thread(load_expert, self._checkpoint, self._shard, layer_id, logical)

    async def rest(self) -> None:
        """Nothing stays open."""


class PeerSource:
    """An ExpertSource that asks a peer that holds the expert, and `disk` where none does or can be
    had. A peer that failed is not asked again before the next `rest`."""

    def __init__(self, form: ExpertForm, rank: int, connect: Connect, disk: DiskSource) -> None:
        self._form = form
        self._rank = rank
        self._connect = connect
        self._disk = disk
        self._fetches: dict[int, Fetch] = {}  # by the peer's instance epoch
        self._failed: set[int] = set()
        self._closed = False
        self._told = 0
        self.bytes_fetched = 0

    async def expert(self, layer_id: int, logical: int, state: ClusterState) -> ExpertWeights:
        """Raises CheckpointError, where it is to be had from disk only."""
        shard = self._form.shard
        for peer in holders(state, layer_id, logical, shard.etp_rank, shard.etp_size):
            known_bad = peer.rank == self._rank or peer.instance_epoch in self._failed
            if known_bad or self._closed:
                continue
            try:
                weights = await self._from(peer, layer_id, logical)
            except (EpserveError, OSError) as error:
                log.warning("experts are read from disk", not_from=peer.rank, reason=str(error))
                await self._give_up(peer)
                continue
            if weights is not None:
                return weights
        return await self._disk.expert(layer_id, logical, state)

    async def _from(self, peer: Member, layer_id: int, logical: int) -> ExpertWeights | None:
        fetch = self._fetches.get(peer.instance_epoch)
        if fetch is None:
            fetch = self._fetches[peer.instance_epoch] = await self._connect(peer)
            log.info("fetching experts", source=peer.rank, transport=fetch.transport)
        found = await fetch.fetch((layer_id, logical), f"expert {logical} of layer {layer_id}")
        if found is None:
            return None
        weights = await in_own_thread(self._form.restore, *found)
        self.bytes_fetched += self._form.num_bytes
        return weights

    async def _give_up(self, peer: Member) -> None:
        self._failed.add(peer.instance_epoch)
        fetch = self._fetches.pop(peer.instance_epoch, None)
        if fetch is not None:
            await fetch.close()

    async def close(self) -> None:
        """No peer is asked any more."""
        self._closed = True
        await self.rest()

    async def rest(self) -> None:
        """Close what is open."""
        if self.bytes_fetched > self._told:
            log.info("experts fetched", bytes_fetched=self.bytes_fetched - self._told)
            self._told = self.bytes_fetched
        self._failed.clear()
        while self._fetches:
            await self._fetches.popitem()[1].close()


def holders(
    state: ClusterState, layer_id: int, logical: int, etp_rank: int, etp_size: int
) -> list[Member]:
    """The READY expert processes that hold this shard of the expert under the placement in use;
    first another one for each expert, so that all have their part in giving."""
    layer = state.placement.layer(layer_id)
    ready = {m.rank: m for m in state.tier(Role.EXPERT) if m.state is MemberState.READY}
    ranks = [
        layer.physical_to_ep_rank[physical] * etp_size + etp_rank
        for physical in layer.replicas(logical)
    ]
    found = [ready[rank] for rank in ranks if rank in ready]
    first = logical % len(found) if found else 0
    return found[first:] + found[:first]
