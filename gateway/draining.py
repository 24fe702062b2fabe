"""Asks one process to end in order, where others can take over what it does.

Knows who holds what. Knows no request: whoever balances sends a leaving group nothing more.
"""

from gateway.cluster import Registry
from gateway.groups import usable_groups
from moe_core.cluster import ClusterState, MemberState, Role
from moe_core.errors import NotFoundError, RequestError, UnavailableError


def drain(registry: Registry, role: Role, rank: int) -> None:
    """Returns at once; the process leaves when it has ended its work. An attention group leaves
    whole. Raises NotFoundError for a process that is not there, RequestError for a gateway and
    UnavailableError where nobody else could do its work."""
    state = registry.state
    member = next((m for m in state.tier(role) if m.rank == rank), None)
    if role is Role.GATEWAY:
        raise RequestError("role=gateway: a gateway drains by SIGTERM, not by itself")
    if member is None:
        raise NotFoundError(f"{role} {rank} is not joined")
    if role is Role.ATTN:
        others = [group for group in usable_groups(state) if group.dp_rank != member.dp_rank]
        if not others:
            raise UnavailableError(f"{role} {rank}: no other attention group can take a request")
        registry.set_leaving(
            role, [m.rank for m in state.tier(role) if m.dp_rank == member.dp_rank]
        )
        return
    if not state.placement.is_covered_by(_staying(state, member.ep_rank)):
        raise UnavailableError(
            f"{role} {rank} holds experts that no other process holds; use redundant experts, or "
            "scale the tier down"
        )
    registry.set_leaving(role, [rank])


def _staying(state: ClusterState, ep_rank: int | None) -> set[int]:
    """EP groups whose processes are all ready and stay, without that of `ep_rank`."""
    ranks = {
        member.rank
        for member in state.tier(Role.EXPERT)
        if member.state is MemberState.READY and not member.leaving
    }
    return state.whole_ep_groups(state.placement, ranks) - {ep_rank}
