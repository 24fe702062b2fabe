from dataclasses import dataclass, field

import pytest
import torch

from attn_service.expert_links import ExpertLinks
from attn_service.experts import StepKey
from moe_core.cluster import ClusterState, Member, MemberState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import PeerLostError, PeerTimeoutError, ProtocolError
from moe_core.placement import ExpertPlacement
from moe_core.transport.base import LinkCounters


@dataclass
class FakeLink:
    member: Member
    transport: str = "fake"
    lost_because: str | None = None
    closed: bool = False
    counters: LinkCounters = field(default_factory=lambda: LinkCounters(dispatches=3))

    async def close(self) -> None:
        self.closed = True


class Tier:
    """Two expert processes and this process's links to them."""

    def __init__(self) -> None:
        self.made: list[FakeLink] = []
        self.refuse: dict[int, Exception] = {}
        self.in_use: list[FakeLink] = []
        self.links = ExpertLinks(2, self._connect, self._make)

    async def _connect(self, member: Member) -> FakeLink:
        if member.rank in self.refuse:
            raise self.refuse[member.rank]
        self.made.append(FakeLink(member))
        return self.made[-1]

    def _make(self, links: list[FakeLink]) -> None:
        self.in_use = list(links)

    def used(self) -> list[tuple[int, int]]:
        return [(link.member.rank, link.member.instance_epoch) for link in self.in_use]


def state(*experts: tuple[int, int, MemberState]) -> ClusterState:
    members = tuple(
        Member(Role.EXPERT, rank, 1, f"host:{rank}", "cpu", member_state, epoch, "host")
        for rank, epoch, member_state in experts
    )
    return ClusterState(1, ParallelConfig(expert_devices=2), members, ExpertPlacement(0, 4, 1, ()))


READY, LOADING = MemberState.READY, MemberState.LOADING
BOTH = state((0, 10, READY), (1, 20, READY))


async def test_experts_are_there_once_every_process_is_connected() -> None:
    tier = Tier()
    await tier.links.reconcile(state((1, 20, READY), (0, 10, LOADING)))
    assert tier.in_use == []
    assert tier.links.missing == ("expert 0: not ready",)
    await tier.links.reconcile(BOTH)
    assert tier.used() == [(0, 10), (1, 20)]
    assert tier.links.missing == ()


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
        await tier.links.reconcile(BOTH)


async def test_a_dispatch_before_there_are_links_names_layer_and_cause() -> None:
    tier = Tier()
    nothing = torch.zeros(1, 1)
    with pytest.raises(PeerLostError, match=r"layer 5 .* no expert process"):
        await tier.links.dispatch(StepKey(0, 1), 5, nothing, nothing, nothing)


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
