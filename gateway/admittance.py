"""Whether a process that wants to join may, and as which rank.

Knows a Join, the members that are there and the sizes. Keeps nothing and changes nothing.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import replace

from moe_core.cluster import ClusterState, Join, Member, MemberState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import RequestError

Place = tuple[Role, int]


def check_same_model(join: Join, fingerprint: str, dtypes: Mapping[Place, str]) -> None:
    """Raises RequestError for another model or dtype, naming both sides' values."""
    if join.model_fingerprint != fingerprint:
        raise RequestError(
            f"model_fingerprint={join.model_fingerprint}: the {join.role} process at "
            f"{join.address} has another model than the gateway, whose fingerprint is "
            f"{fingerprint}; start both with the same --model"
        )
    for (role, rank), dtype in dtypes.items():
        if dtype != join.dtype:
            raise RequestError(
                f"dtype={join.dtype}: {role} {rank} has joined with dtype={dtype}, and all "
                f"processes need the same; start the {join.role} process at {join.address} "
                f"with --dtype {dtype}"
            )


def rank_for(join: Join, state: ClusterState, gone: Collection[Place]) -> int:
    """The rank that a process gets. Ranks of `gone` members are free, and so is the one that the
    same start of the same process has. Raises RequestError, naming who has the rank."""
    size = state.room(join.role)
    holders = {member.rank: member for member in state.tier(join.role)}
    free = [
        rank
        for rank in range(size)
        if rank not in holders or (join.role, rank) in gone or is_same(join, holders[rank])
    ]
    if join.rank is None and free:
        return free[0]
    if join.rank in free:
        return join.rank
    free_ranks = ", ".join(map(str, free)) or "none"
    tier = f"the {join.role} tier has {size} processes, free ranks: {free_ranks}"
    if join.rank is None:
        raise RequestError(f"rank: none is left for {join.address}; {tier}")
    if join.rank >= size:
        raise RequestError(f"rank={join.rank}: must be below {size}; {tier}")
    holder = holders[join.rank]
    raise RequestError(f"rank={join.rank}: taken by pid {holder.pid} at {holder.address}; {tier}")


def has_exited(member: Member, own_host_id: str) -> bool:
    """Whether a member's process is no more, where that can be seen from here."""
    if member.host_id != own_host_id:
        return False
    try:
        os.kill(member.pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # it is another user's, or never was one
        return False
    return False


def new_member(join: Join, rank: int, parallel: ParallelConfig) -> Member:
    """A process that has only just joined, as a rank of `parallel`."""
    member = Member(
        role=join.role,
        rank=rank,
        pid=join.pid,
        address=join.address,
        device=join.device,
        state=MemberState.LOADING,
        instance_epoch=join.instance_epoch,
        host_id=join.host_id,
    )
    if join.role is Role.ATTN:
        dp_rank, tp_rank = parallel.attention_ranks(rank)
        return replace(member, dp_rank=dp_rank, tp_rank=tp_rank)
    ep_rank, etp_rank = parallel.expert_ranks(rank)
    return replace(member, ep_rank=ep_rank, etp_rank=etp_rank)


def is_same(join: Join, holder: Member) -> bool:
    """A worker that noticed before this gateway that its stream is gone."""
    return (join.instance_epoch, join.pid, join.host_id) == (
        holder.instance_epoch,
        holder.pid,
        holder.host_id,
    )
