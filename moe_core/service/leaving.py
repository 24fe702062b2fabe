"""A worker that is asked to leave: how it learns of it.

Knows the cluster's state and the worker's place in it. Knows nothing of how a worker leaves.
"""

import structlog

from moe_core.cluster import Role
from moe_core.service.membership import Membership

log = structlog.get_logger(__name__)


async def told_to_leave(membership: Membership, role: Role) -> None:
    """Returns when this worker is to drain and to leave, as after a signal. Raises as
    `membership.lost` when it is out of the cluster before."""
    state = membership.state
    while not any(member.rank == membership.rank and member.leaving for member in state.tier(role)):
        state = await membership.next_state(state)
    log.info("draining, since the cluster has asked for it", role=str(role), rank=membership.rank)
