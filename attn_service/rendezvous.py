"""How the processes of one attention TP group find each other.

Knows what the cluster state says of the group's members: the address of the store that lives on
tp_rank 0, and the address and start of tp_rank 0 itself. Knows no collective and no plan.
"""

import asyncio
from dataclasses import dataclass

import torch
from torch.distributed import Store  # type: ignore[attr-defined]  # torch exports it silently

from attn_service.tensor_parallel import (
    DistributedTensorParallel,
    GroupRank,
    form,
    join_store,
    open_store,
)
from moe_core.cluster import ClusterState, Member, MemberState, Role
from moe_core.service.addresses import join_address, split_address
from moe_core.service.membership import Membership


@dataclass(frozen=True, slots=True)
class Group:
    """A group that has formed. `leader` is tp_rank 0 as the cluster knows it."""

    rank: GroupRank
    leader: Member
    store_address: str  # empty on all ranks but 0
    store: Store
    tensor_parallel: DistributedTensorParallel


async def meet(
    membership: Membership,
    rank: GroupRank,
    own_host: str,
    device: torch.device,
    *,
    arrival_timeout_s: float,
    collective_timeout_s: float,
) -> Group:
    """Wait until every rank of the group has joined the cluster, and form the group.

    Blocking calls run off the loop. Raises UnavailableError naming who did not come.
    """
    store_address = ""
    if rank.tp_rank == 0:
        store = open_store(own_host, rank.tp_size, collective_timeout_s)
        store_address = join_address(own_host, store.port)
        membership.report(MemberState.CONNECTING, store_address=store_address)
    state = await membership.wait_until(
        lambda state: _is_there(state, rank), arrival_timeout_s, f"the ranks of {rank}"
    )
    leader = _members(state, rank)[0]
    if rank.tp_rank != 0:
        host, port = split_address("store_address", leader.store_address)
        store = await asyncio.to_thread(join_store, host, port, rank.tp_size, collective_timeout_s)
    tensor_parallel = await asyncio.to_thread(form, rank, store, device, collective_timeout_s)
    return Group(rank, leader, store_address, store, tensor_parallel)


def _members(state: ClusterState, rank: GroupRank) -> list[Member]:
    return [member for member in state.tier(Role.ATTN) if member.dp_rank == rank.dp_rank]


def _is_there(state: ClusterState, rank: GroupRank) -> bool:
    """A member that is past meeting is of a group that has lost a rank and is about to end."""
    members = _members(state, rank)
    meeting = all(m.state in (MemberState.LOADING, MemberState.CONNECTING) for m in members)
    return len(members) == rank.tp_size and meeting and bool(members[0].store_address)
