"""When a cluster counts as ready, and what is said while it does not."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from epserve.local_cluster import wait_ready
from moe_core.cluster import ClusterState, Member, MemberState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import UnavailableError
from moe_core.placement import ExpertPlacement

PARALLEL = ParallelConfig(expert_devices=2, ep_size=2)


def member(role: Role, rank: int, state: MemberState, detail: str = "") -> Member:
    return Member(role, rank, 1, "127.0.0.1:1", "cpu", state, 1, "here", detail=detail)


def state(*members: Member) -> ClusterState:
    return ClusterState(1, PARALLEL, members, ExpertPlacement(0, 2, 2, ()))


READY = state(
    member(Role.GATEWAY, 0, MemberState.READY),
    member(Role.ATTN, 0, MemberState.READY),
    member(Role.EXPERT, 0, MemberState.READY),
    member(Role.EXPERT, 1, MemberState.READY),
)
LOADING = state(
    member(Role.GATEWAY, 0, MemberState.CONNECTING),
    member(Role.ATTN, 0, MemberState.LOADING, "3 of 7 tensors"),
    member(Role.EXPERT, 0, MemberState.READY),
)


class Gateway:
    """Answers with one state after the other, the last one for ever; None is not listening."""

    target = "127.0.0.1:7"

    def __init__(self, states: Iterable[ClusterState | None]) -> None:
        self._states = list(states)

    async def cluster(self, timeout_s: float = 5.0) -> ClusterState:
        latest = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        if latest is None:
            raise UnavailableError("not listening")
        return latest


async def test_ready_is_when_the_gateway_and_both_whole_tiers_are():
    said: list[str] = []
    found = await wait_ready(Gateway([None, None, LOADING, READY]), PARALLEL, 10.0, said.append)
    assert found == READY
    assert said == [
        "gateway starting",
        "expert 1 starting, attn 0 loading (3 of 7 tensors)",
    ]


async def test_the_gateway_is_named_where_it_alone_is_not_ready():
    gateway = member(Role.GATEWAY, 0, MemberState.CONNECTING, "no load has been reported yet")
    said: list[str] = []
    nearly = replace(READY, members=(gateway, *READY.members[1:]))
    await wait_ready(Gateway([nearly, READY]), PARALLEL, 10.0, said.append)
    assert said == ["gateway connecting (no load has been reported yet)"]


async def test_what_is_missing_is_named_after_the_timeout():
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:7 is not ready .*expert 1 starting"):
        await wait_ready(Gateway([LOADING]), PARALLEL, 0.3)
