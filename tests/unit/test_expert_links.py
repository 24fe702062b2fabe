import asyncio
from dataclasses import dataclass, field, replace

import pytest

from attn_service.expert_links import ExpertLinks
from moe_core.cluster import ClusterState, Member, MemberState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import PeerLostError, PeerTimeoutError, ProtocolError
from moe_core.placement import ExpertPlacement
from moe_core.transport.base import LinkCounters
from support.moe_configs import moe_model


@dataclass
class FakeLink:
    member: Member
    peer: str = "an expert"
    transport: str = "fake"
    lost_because: str | None = None
    closed: bool = False
    counters: LinkCounters = field(default_factory=lambda: LinkCounters(dispatches=3))

    def lose(self, reason: str) -> None:
        self.lost_because = reason

    async def close(self) -> None:
        self.closed = True


class Tier:
    """Two expert processes and this process's links to them."""

    def __init__(self) -> None:
        self.made: list[FakeLink] = []
        self.refuse: dict[int, Exception] = {}
        self.hangs: set[int] = set()
        self.links = ExpertLinks(1, self._connect)

    @property
    def in_use(self) -> dict[int, FakeLink]:
        return dict(sorted(self.links.peers.links.items()))

    async def _connect(self, member: Member) -> FakeLink:
        if member.rank in self.refuse:
            raise self.refuse[member.rank]
        if member.rank in self.hangs:
            await asyncio.sleep(3600)
        self.made.append(FakeLink(member))
        return self.made[-1]

    def used(self) -> list[tuple[int, int]]:
        return [(link.member.rank, link.member.instance_epoch) for link in self.in_use.values()]


def state(*experts: tuple[int, int, MemberState]) -> ClusterState:
    members = tuple(
        Member(
            *(Role.EXPERT, rank, 1, f"host:{rank}", "cpu", member_state, epoch, "host"),
            detail="no lease for 3 s" if member_state is MemberState.FAILED else "",
        )
        for rank, epoch, member_state in experts
    )
    return ClusterState(1, PARALLEL, members, placement(2))


def placement(ep_size: int, redundant: int = 0) -> ExpertPlacement:
    parallel = ParallelConfig(
        expert_devices=ep_size, ep_size=ep_size, num_redundant_experts=redundant
    )
    return ExpertPlacement.initial(moe_model(), parallel)


PARALLEL = ParallelConfig(expert_devices=2, ep_size=2)
READY, LOADING, FAILED = MemberState.READY, MemberState.LOADING, MemberState.FAILED
BOTH = state((0, 10, READY), (1, 20, READY))


async def test_processes_are_connected_as_they_become_ready() -> None:
    tier = Tier()
    assert await tier.links.reconcile(state((1, 20, READY), (0, 10, LOADING)))
    assert tier.used() == [(1, 20)]
    assert tier.links.missing == ("expert 0: not ready",)
    assert await tier.links.reconcile(BOTH)
    assert tier.used() == [(0, 10), (1, 20)]
    assert tier.links.missing == ()
    assert not await tier.links.reconcile(BOTH)


async def test_one_copy_of_every_expert_is_enough_to_serve() -> None:
    tier = Tier()
    await tier.links.reconcile(state((1, 20, READY)))
    assert not tier.links.can_serve(placement(2))
    assert tier.links.can_serve(placement(2, redundant=8))
    assert BOTH.holds_all_experts(placement(2))
    assert not state((1, 20, READY), (0, 10, LOADING)).holds_all_experts(placement(2))
    await tier.links.reconcile(BOTH)
    assert tier.links.can_serve(placement(2))


async def test_a_process_that_does_not_answer_keeps_no_other_waiting() -> None:
    tier = Tier()
    tier.hangs.add(0)
    async with asyncio.timeout(5.0):
        await tier.links.reconcile(BOTH)
    assert tier.used() == [(1, 20)]
    assert tier.links.missing == ("expert 0: does not answer yet",)
    before = len(asyncio.all_tasks())
    await tier.links.close()
    assert len(asyncio.all_tasks()) == before - 1


async def test_ranks_are_followed_beyond_what_was_configured() -> None:
    tier = Tier()
    await tier.links.reconcile(BOTH)
    grown = replace(state((0, 10, READY), (1, 20, READY), (2, 30, READY)), placement=placement(4))
    await tier.links.reconcile(grown)
    assert tier.used() == [(0, 10), (1, 20), (2, 30)]
    assert tier.links.missing == ("expert 3: not ready",)
    gone = tier.in_use[2]
    await tier.links.reconcile(BOTH)  # scaled down, but the process is still there
    assert 2 in tier.in_use
    gone.lost_because = "left"
    await tier.links.reconcile(BOTH)
    assert tier.used() == [(0, 10), (1, 20)]
    assert gone.closed


async def test_a_healthy_link_is_kept_even_when_the_cluster_forgets_its_peer() -> None:
    tier = Tier()
    await tier.links.reconcile(BOTH)
    await tier.links.reconcile(state())
    await tier.links.reconcile(BOTH)
    assert len(tier.made) == 2
    assert tier.links.missing == ()


async def test_a_restarted_process_gets_a_new_link_and_the_old_one_is_closed() -> None:
    tier = Tier()
    await tier.links.reconcile(BOTH)
    old = tier.in_use[1]
    old.lost_because = "killed"
    await tier.links.reconcile(state((0, 10, READY)))
    assert tier.links.missing == ("expert 1: killed",)
    assert tier.in_use[1] is old  # what fails now is told by the link that knows why
    await tier.links.reconcile(state((0, 10, READY), (1, 21, READY)))
    assert tier.used() == [(0, 10), (1, 21)]
    assert old.closed
    assert tier.links.missing == ()


async def test_a_lost_link_to_a_process_that_still_lives_is_made_again() -> None:
    tier = Tier()
    await tier.links.reconcile(BOTH)
    tier.in_use[0].lost_because = "the network"
    await tier.links.reconcile(BOTH)
    assert [link.member.rank for link in tier.made] == [0, 1, 0]
    assert tier.links.missing == ()


async def test_a_process_that_is_failed_is_lost_until_it_has_joined_again() -> None:
    tier = Tier()
    await tier.links.reconcile(BOTH)
    old = tier.in_use[1]
    assert tier.links.peers.group(1)
    tier.links.give_up(state((0, 10, READY), (1, 20, FAILED)))
    assert old.lost_because == "the cluster takes it for failed, no lease for 3 s"
    assert not tier.links.peers.group(1)
    await tier.links.reconcile(state((0, 10, READY), (1, 20, FAILED)))
    assert tier.in_use[1] is old
    assert not old.closed
    await tier.links.reconcile(state((0, 10, READY), (1, 20, LOADING)))
    assert tier.in_use[1] is old
    assert await tier.links.reconcile(BOTH)  # the same start of it
    assert old.closed
    assert tier.used() == [(0, 10), (1, 20)]
    assert tier.links.missing == ()


async def test_only_the_start_that_has_failed_is_given_up() -> None:
    tier = Tier()
    await tier.links.reconcile(BOTH)
    tier.links.give_up(state((0, 10, READY), (1, 19, FAILED)))
    assert tier.in_use[1].lost_because is None


async def test_a_lost_link_is_closed_before_its_process_is_met_again() -> None:
    tier = Tier()
    await tier.links.reconcile(BOTH)
    old = tier.in_use[1]
    old.lost_because = "frozen"
    tier.refuse[1] = PeerTimeoutError("no answer")
    await tier.links.reconcile(BOTH)
    assert old.closed
    assert tier.links.missing == ("expert 1: no answer",)


@pytest.mark.parametrize("error", [PeerLostError("no route"), PeerTimeoutError("no answer")])
async def test_a_process_that_cannot_be_reached_is_named_and_tried_again(error: Exception) -> None:
    tier = Tier()
    tier.refuse[1] = error
    await tier.links.reconcile(BOTH)
    assert tier.links.missing == (f"expert 1: {error}",)
    tier.refuse.clear()
    await tier.links.reconcile(BOTH)
    assert tier.links.missing == ()


async def test_a_process_that_does_not_fit_is_an_error() -> None:
    tier = Tier()
    tier.refuse[0] = ProtocolError("hidden_size is 64 here, 32 there")
    with pytest.raises(ProtocolError, match="hidden_size"):
        await tier.links.reconcile(state((0, 10, READY)))


async def test_one_that_does_not_fit_ends_nothing_where_others_do() -> None:
    tier = Tier()
    await tier.links.reconcile(state((0, 10, READY)))
    tier.refuse[1] = ProtocolError("it has been restarted")
    await tier.links.reconcile(BOTH)
    assert tier.links.missing == ("expert 1: it has been restarted",)
    tier.refuse.clear()
    await tier.links.reconcile(BOTH)
    assert tier.links.missing == ()


async def test_stats_are_by_rank_and_name_both_ends() -> None:
    tier = Tier()
    await tier.links.reconcile(state((1, 20, READY), (0, 10, READY)))
    stats = tier.links.stats("attn 4")
    assert [(s.source, s.target, s.transport, s.dispatches) for s in stats] == [
        ("attn 4", "expert 0", "fake", 3),
        ("attn 4", "expert 1", "fake", 3),
    ]


async def test_close_closes_every_link() -> None:
    tier = Tier()
    await tier.links.reconcile(BOTH)
    await tier.links.close()
    assert all(link.closed for link in tier.made)
