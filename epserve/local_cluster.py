"""A whole cluster on this machine, from a launch plan to ready and down again.

Knows the plan, the supervisor and the gateway's client. Prints nothing: lines and progress go
to the callbacks it was given.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from epserve.client import EpserveClient
from epserve.launch_plan import LaunchPlan
from epserve.supervisor import LineSink, Supervisor
from epserve.upkeep import Note, Upkeep
from moe_core.cluster import ClusterState, Member, MemberState, Role, TierSizes
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import UnavailableError
from moe_core.listing import listed

READY_TIMEOUT_S = 3600.0  # the largest checkpoints take tens of minutes from slow disks
POLL_S = 0.1
_Result = TypeVar("_Result")
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """A cluster whose every process is up and ready."""

    plan: LaunchPlan
    client: EpserveClient
    supervisor: Supervisor

    async def guard(self, work: Coroutine[None, None, _Result]) -> _Result:
        """The result of `work`; ProcessEndedError when a process ends before it is done."""
        return await self.supervisor.guard(work)

    async def keep_up(self, note: Note) -> NoReturn:
        """Start again what dies, and what the tiers grow by, until cancelled; `note` is told.
        Raises ProcessEndedError for a process that cannot be kept up."""
        parallel = self.plan.parallel
        sizes = TierSizes.of(parallel)
        await Upkeep(self.supervisor, self.plan.child, sizes, note).run(self.client)


@asynccontextmanager
async def running_cluster(
    plan: LaunchPlan,
    sink: LineSink,
    progress: Progress,
    *,
    grace_s: float,
    ready_timeout_s: float = READY_TIMEOUT_S,
) -> AsyncIterator[LocalCluster]:
    """Start the plan's processes and wait until all are ready; leaving stops them.

    Raises ProcessEndedError when one of them ends meanwhile, UnavailableError when they are not
    ready in time.
    """
    async with (
        Supervisor(plan.children(), sink, grace_s) as supervisor,
        EpserveClient(plan.client_target) as client,
    ):
        await supervisor.guard(wait_ready(client, plan.parallel, ready_timeout_s, progress))
        yield LocalCluster(plan, client, supervisor)


async def wait_ready(
    client: EpserveClient,
    parallel: ParallelConfig,
    timeout_s: float,
    progress: Progress = lambda _: None,
) -> ClusterState:
    """The first cluster state in which the gateway and both whole tiers are ready.

    `progress` is told who is still missing whenever that changes. Raises UnavailableError with
    the same words after `timeout_s` seconds.
    """
    waiting_for = ""
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                state = await _state_or_none(client)
                latest = _not_ready(state, parallel)
                if state is not None and not latest:
                    return state
                if latest != waiting_for:
                    waiting_for = latest
                    progress(waiting_for)
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise UnavailableError(
            f"the cluster at {client.target} is not ready after {timeout_s:g} s: {waiting_for}"
        ) from None


async def _state_or_none(client: EpserveClient) -> ClusterState | None:
    try:
        return await client.cluster()
    except UnavailableError:  # the gateway is not listening yet
        return None


def _not_ready(state: ClusterState | None, parallel: ParallelConfig) -> str:
    """Who is not ready, in words; empty when everybody is. The gateway is the last to be ready, so
    it is named where it is the only one."""
    if state is None:
        return "gateway starting"
    found = {(member.role, member.rank): member for member in state.members}
    wanted = [(Role.EXPERT, rank) for rank in range(parallel.expert_devices)]
    wanted += [(Role.ATTN, rank) for rank in range(parallel.attn_devices)]
    words = (_unready_words(role, rank, found.get((role, rank))) for role, rank in wanted)
    missing = list(filter(None, words))
    return listed(missing) or _unready_words(Role.GATEWAY, 0, found.get((Role.GATEWAY, 0)))


def _unready_words(role: Role, rank: int, member: Member | None) -> str:
    name = role.value if role is Role.GATEWAY else f"{role} {rank}"
    if member is None:
        return f"{name} starting"
    if member.state is MemberState.READY:
        return ""
    return f"{name} {member.state}" + (f" ({member.detail})" if member.detail else "")
