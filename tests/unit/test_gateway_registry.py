"""The registry without any stream: versions, refusals and successors."""

import asyncio

import pytest

from moe_core.cluster import (
    AttentionLoad,
    ExpertLoad,
    Join,
    LinkStats,
    MemberState,
    Role,
    StatusReport,
)
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import NotFoundError, RequestError
from support.small_gateway import FINGERPRINT, make_registry

PARALLEL = ParallelConfig(attn_devices=2, dp_size=2, expert_devices=2)


def join(role: Role = Role.ATTN, rank: int | None = None, epoch: int = 1) -> Join:
    return Join(role, "h:1", "cpu", 7, FINGERPRINT, epoch, "float32", "here", rank)


def test_versions_grow_with_what_others_act_upon_only() -> None:
    registry = make_registry(PARALLEL)
    key = registry.join(join())
    load = AttentionLoad(0, 0, 8, 8, 4)
    registry.report(key, StatusReport(MemberState.READY, attention_load=load))
    version = registry.state.version
    link = LinkStats("attn 0", "expert 0", "grpc", 1, 1, 1, 1, 1, 1)
    later = AttentionLoad(1, 0, 7, 8, 4)
    registry.report(key, StatusReport(MemberState.READY, attention_load=later, links=(link,)))
    assert registry.state.version == version
    (member,) = registry.state.tier(Role.ATTN)
    assert member.attention_load == later
    assert member.links == (link,)
    registry.report(key, StatusReport(MemberState.DRAINING))
    assert registry.state.version > version


def test_expert_load_stays_while_other_reports_come() -> None:
    registry = make_registry(PARALLEL)
    key = registry.join(join())
    version = registry.state.version
    load = ExpertLoad((1, 2), ((0, 1, 2, 3, 4, 5, 6, 7), (8,) * 8))
    registry.report_expert_load(key, load)
    assert registry.state.version == version
    registry.report(key, StatusReport(MemberState.READY))
    (member,) = registry.state.tier(Role.ATTN)
    assert member.expert_load == load


@pytest.mark.parametrize(
    "load",
    [
        ExpertLoad((), ()),
        ExpertLoad((0, 1), ((0,) * 8,) * 2),
        ExpertLoad((1, 2), ((0,) * 8, (0,) * 7)),
    ],
)
def test_expert_load_of_another_shape_is_refused(load: ExpertLoad) -> None:
    registry = make_registry(PARALLEL)
    key = registry.join(join())
    with pytest.raises(
        RequestError, match=r"attn 0 reports .* 8 experts in each of its MoE layers 1, 2"
    ):
        registry.report_expert_load(key, load)


def test_late_leave_of_a_predecessor_does_not_remove_its_successor() -> None:
    registry = make_registry(PARALLEL)
    old = registry.join(join(epoch=1))
    registry.leave(old)
    registry.join(join(epoch=2))
    registry.leave(old)
    assert [member.instance_epoch for member in registry.state.tier(Role.ATTN)] == [2]
    with pytest.raises(NotFoundError, match="instance_epoch 1"):
        registry.report(old, StatusReport(MemberState.READY))


def test_gateway_cannot_join_a_gateway() -> None:
    with pytest.raises(RequestError, match="role=gateway"):
        make_registry().join(join(Role.GATEWAY))


def test_missing_names_every_rank_that_is_not_ready() -> None:
    registry = make_registry(PARALLEL)
    registry.report(registry.join(join(rank=1)), StatusReport(MemberState.LOADING, "layer 3 of 9"))
    assert registry.state.missing(Role.ATTN) == (
        "attn 0: not joined",
        "attn 1: loading (layer 3 of 9)",
    )


async def test_waiting_for_a_newer_state_ends_with_the_next_change() -> None:
    registry = make_registry(PARALLEL)
    waiting = asyncio.create_task(registry.newer_than(registry.state.version))
    await asyncio.sleep(0)
    assert not waiting.done()
    registry.join(join())
    async with asyncio.timeout(1):
        state = await waiting
    assert len(state.tier(Role.ATTN)) == 1
