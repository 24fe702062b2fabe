"""What a gateway that was started again believes of what workers tell it."""

import os
from dataclasses import replace

import pytest

from gateway.cluster import Registry
from gateway.registrations import MemberKey
from moe_core.cluster import Join, MemberState, Role, StatusReport, TierSizes
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import RequestError
from moe_core.placement import ExpertPlacement
from support.moe_configs import moe_model
from support.small_gateway import FINGERPRINT, make_registry

MODEL = moe_model()
STARTED_WITH = ParallelConfig(expert_devices=2, ep_size=2).with_model(MODEL)
GROWN = replace(STARTED_WITH, expert_devices=4, ep_size=4)
WIDER = replace(STARTED_WITH, attn_devices=2, dp_size=2)


def placement(epoch: int, parallel: ParallelConfig = STARTED_WITH) -> ExpertPlacement:
    return replace(ExpertPlacement.initial(MODEL, parallel), epoch=epoch)


def telling(
    told: ExpertPlacement,
    parallel: ParallelConfig = STARTED_WITH,
    rank: int = 0,
    role: Role = Role.EXPERT,
) -> Join:
    return Join(
        *(role, "h:1", "cpu", os.getpid(), FINGERPRINT, 9, "float32", "here", rank),
        *(told, parallel),
    )


def fresh(role: Role, epoch: int = 1) -> Join:
    return Join(role, "h:1", "cpu", os.getpid(), FINGERPRINT, epoch, "float32", "here")


def complete(registry: Registry) -> list[MemberKey]:
    joins = (fresh(Role.ATTN), fresh(Role.EXPERT, 1), fresh(Role.EXPERT, 2))
    keys = [registry.join(each) for each in joins]
    for key in keys:
        registry.report(key, StatusReport(MemberState.READY))
    return keys


def test_the_newest_placement_and_its_sizes_are_taken_over() -> None:
    registry = make_registry(STARTED_WITH)
    registry.join(telling(placement(3, GROWN), GROWN, rank=3))
    registry.join(telling(placement(2)))
    state = registry.state
    assert state.placement == placement(3, GROWN)
    assert state.parallel == GROWN
    assert [member.ep_rank for member in state.tier(Role.EXPERT)] == [0, 3]


def test_sizes_smaller_than_those_at_the_start_are_taken_over_too() -> None:
    registry = make_registry(GROWN)
    registry.join(telling(placement(1)))
    assert registry.parallel == STARTED_WITH


def test_of_sizes_told_with_one_placement_the_larger_count() -> None:
    registry = make_registry(STARTED_WITH)
    registry.join(telling(placement(0), WIDER))
    registry.join(telling(placement(0), STARTED_WITH, rank=1))
    assert registry.parallel == WIDER
    registry.join(telling(placement(0), WIDER, rank=1, role=Role.ATTN))


def test_sizes_told_to_a_gateway_that_has_been_complete_change_nothing() -> None:
    registry = make_registry(STARTED_WITH)
    complete(registry)
    registry.set_sizes(registry.parallel, TierSizes(2, 2))
    registry.join(telling(placement(0), WIDER, rank=1, role=Role.ATTN))
    assert registry.parallel == STARTED_WITH


def test_what_a_refused_worker_tells_is_not_taken_over() -> None:
    registry = make_registry(STARTED_WITH)
    with pytest.raises(RequestError, match="rank=9: must be below 4"):
        registry.join(telling(placement(3, GROWN), GROWN, rank=9))
    assert registry.state.placement.epoch == 0
    assert registry.parallel == STARTED_WITH


def test_experts_that_members_hold_follow_the_placement_that_is_taken_over() -> None:
    registry = make_registry(STARTED_WITH)
    registry.join(fresh(Role.EXPERT))
    registry.join(telling(placement(1, GROWN), GROWN, rank=1))
    assert {member.experts for member in registry.state.tier(Role.EXPERT)} == {2}


@pytest.mark.parametrize(
    ("told", "parallel", "named"),
    [
        (placement(0, GROWN), GROWN, "another one of epoch 0"),
        (replace(placement(1), layers=placement(1).layers[:1]), STARTED_WITH, "experts in layers"),
        (
            placement(1),
            replace(STARTED_WITH, shared_experts="expert"),
            "shared_experts=expert: .* shared_experts=attention",
        ),
        (placement(1), ParallelConfig(expert_devices=4, ep_size=2), "etp_size=2: .*etp_size=1"),
    ],
)
def test_what_contradicts_is_refused_by_name(
    told: ExpertPlacement, parallel: ParallelConfig, named: str
) -> None:
    registry = make_registry(STARTED_WITH)
    with pytest.raises(RequestError, match=named):
        registry.join(telling(told, parallel.with_model(MODEL)))


def test_a_newer_placement_than_that_of_a_complete_cluster_is_refused() -> None:
    registry = make_registry(STARTED_WITH)
    registry.leave(complete(registry)[-1])
    with pytest.raises(RequestError, match=r"knows epoch 5, .* complete with epoch 0"):
        registry.join(telling(placement(5), rank=1))
