"""What becomes of a layer when expert processes are lost, fail or are late."""

import asyncio

import pytest
import torch

from attn_service.experts import Combined
from moe_core.config.parallel import ParallelConfig
from support.expert_tier import Routing, random_routing
from support.fake_links import Tier, rows_sent
from support.moe_configs import moe_model

MODEL = moe_model(num_experts=8, top_k=3)
SHARED = moe_model(num_experts=8, top_k=3, n_shared_experts=1)
NUM_TOKENS = 12
FAILURES = ["posting", "leaving", "waiting", "refusing"]


def parallel(
    ep_size: int = 4, etp_size: int = 1, level: int = 2, redundant: int = 8, shared: bool = False
) -> ParallelConfig:
    return ParallelConfig(
        expert_devices=ep_size * etp_size,
        ep_size=ep_size,
        expert_parallel_degree=level,
        num_redundant_experts=redundant,
        shared_experts="expert" if shared else "attention",
    )


def routing(seed: int = 0, num_tokens: int = NUM_TOKENS) -> Routing:
    return random_routing(MODEL, num_tokens, torch.float64, seed)


def check(tier: Tier, batch: Routing, result: Combined) -> None:
    """Every token has its sum: complete, nothing twice, nothing of a group in parts."""
    assert result.lost == ()
    assert torch.allclose(result.hidden_states, tier.expected(batch), rtol=1e-9)
    assert tier.unreleased() == []


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("failure", FAILURES)
async def test_what_a_process_was_to_compute_is_computed_by_others(
    failure: str, level: int, shared: bool
) -> None:
    tier = Tier(SHARED if shared else MODEL, parallel(level=level, shared=shared))
    tier.links[2].fails = failure
    batch = routing()
    check(tier, batch, await tier.run(batch))


@pytest.mark.parametrize("failure", FAILURES)
async def test_the_rows_that_are_sent_again_are_those_that_were_lost(failure: str) -> None:
    undisturbed = Tier(MODEL, parallel())
    batch = routing()
    await undisturbed.run(batch)
    slots = undisturbed.placement.layer(1).physical_to_logical
    lost = [slots[p] for row in rows_sent(undisturbed.links, 0)[2] for p in row]

    tier = Tier(MODEL, parallel())
    tier.links[2].fails = failure
    await tier.run(batch)
    again = rows_sent(tier.links, 1)
    assert again[2] == []
    assert sorted(slots[p] for rows in again.values() for row in rows for p in row) == sorted(lost)
    assert all(rows for sent in again.values() for rows in sent)
    assert {a.dispatch.key.attempt for a in tier.answers} == {0, 1}


async def test_the_next_layers_and_steps_avoid_a_lost_process_at_once() -> None:
    tier = Tier(MODEL, parallel())
    tier.links[2].fails = "posting"
    await tier.run(routing())
    for step in (1, 2):
        batch = routing(step)
        check(tier, batch, await tier.run(batch, step=step))
    assert {a.dispatch.key.attempt for a in tier.answers if a.dispatch.key.step} == {0}


async def test_what_is_under_way_to_a_process_that_is_given_up_is_sent_to_others_at_once() -> None:
    tier = Tier(MODEL, parallel(), wait_s=30.0, hedge_after_s=30.0)
    tier.links[2].fails = "slow"
    batch = routing()
    running = asyncio.create_task(tier.run(batch))
    await asyncio.sleep(0.01)
    async with asyncio.timeout(5.0):
        tier.peers.lose(2, "no lease for 3 s")
        check(tier, batch, await running)
    late = [answer.dispatch for answer in tier.links[2].posted]
    tier.links[2].answer_all()  # too late: nobody looks
    assert late
    check(tier, routing(1), await tier.run(routing(1), step=1))
    assert len(tier.links[2].posted) == len(late)


async def test_a_lost_shard_voids_its_whole_group_for_the_slice() -> None:
    tier = Tier(MODEL, parallel(ep_size=2, etp_size=2, level=1))
    tier.links[2].fails = "waiting"
    batch = routing()
    check(tier, batch, await tier.run(batch))
    # The other shard had answered; its answer is released, and both shards of the other group are
    # sent what was the lost group's.
    assert [len(link.posted) for link in tier.links] == [2, 2, 1, 1]


async def test_two_processes_may_fail_one_after_the_other() -> None:
    tier = Tier(MODEL, parallel(redundant=16))
    tier.links[1].fails = "waiting"
    tier.links[3].fails = "posting"
    batch = routing()
    check(tier, batch, await tier.run(batch))


async def test_a_substitute_that_fails_too_is_replaced() -> None:
    tier = Tier(MODEL, parallel(redundant=16))
    tier.links[0].fails = "refusing"

    def refuse_what_is_sent_again(dispatch, send=tier.links[1].try_dispatch):  # noqa: ANN001
        if dispatch.key.attempt:
            tier.links[1].fails = "refusing"
        return send(dispatch)

    tier.links[1].try_dispatch = refuse_what_is_sent_again
    batch = routing(3)
    check(tier, batch, await tier.run(batch))
    assert {a.dispatch.key.attempt for a in tier.answers} >= {0, 1, 2}


async def test_sums_are_in_ascending_rank_order_after_a_failure() -> None:
    """In float32 the order shows; it is that of a tier that never had the lost process's turn."""
    batch = random_routing(MODEL, NUM_TOKENS, torch.float32, 5)
    tier = Tier(MODEL, parallel(ep_size=2))
    tier.links[1].fails = "waiting"
    first = (await tier.run(batch)).hidden_states
    again = Tier(MODEL, parallel(ep_size=2))
    again.links[1].fails = "posting"
    assert torch.equal(first, (await again.run(batch)).hidden_states)


async def test_without_a_copy_only_the_rows_that_need_the_lost_experts_are_lost() -> None:
    tier = Tier(MODEL, parallel(redundant=0))
    batch = routing()
    held = set(tier.placement.layer(1).logical_experts(2))
    wanted = [row for row, ids in enumerate(batch.topk_ids.tolist()) if held & set(ids)]
    assert 0 < len(wanted) < NUM_TOKENS
    tier.links[2].fails = "waiting"
    for step in range(2):  # once it is found out, and once it is known
        result = await tier.run(batch, step=step)
        rows = sorted(row for each in result.lost for row in each.rows.tolist())
        assert rows == wanted
        kept = [row for row in range(NUM_TOKENS) if row not in wanted]
        assert torch.allclose(result.hidden_states[kept], tier.expected(batch)[kept])
        assert result.hidden_states[wanted].abs().sum() == 0
        assert tier.unreleased() == []
        for each in result.lost:
            assert "expert 2" in each.reason
            assert "layer 1" in each.reason
            assert all(str(expert) in each.reason for expert in held)
    # What is known to be lost is not sent to anybody.
    second = [a.dispatch.num_tokens for a in tier.answers if a.dispatch.key.step == 1]
    assert sum(second) <= 3 * (NUM_TOKENS - len(wanted))


async def test_rows_that_are_not_asked_for_are_not_sent() -> None:
    tier = Tier(MODEL, parallel())
    batch = routing()
    rows = torch.tensor([1, 4, 5])
    result = await tier.run(batch, rows)
    assert torch.allclose(result.hidden_states[rows], tier.expected(batch)[rows])
    sent = torch.cat([answer.dispatch.hidden_states for answer in tier.answers]).tolist()
    assert all(any(row == wanted for wanted in batch.hidden[rows].tolist()) for row in sent)


async def test_a_late_process_is_hedged_and_avoided_until_its_answer_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("attn_service.peers.AVOID_LATE_TIMES", 0.1)
    tier = Tier(MODEL, parallel(), hedge_after_s=0.02)
    tier.links[2].fails = "slow"
    batch = routing()
    check(tier, batch, await tier.run(batch))
    assert tier.links[2].posted[0].owed
    for step in (1, 2):
        check(tier, batch, await tier.run(batch, step=step))
    assert len(tier.links[2].posted) == 1
    tier.links[2].answer_all()
    tier.links[2].fails = ""
    async with asyncio.timeout(5.0):
        while len(tier.links[2].posted) == 1:
            check(tier, batch, await tier.run(batch, step=3))
            await asyncio.sleep(0.02)


async def test_an_answer_that_comes_before_its_hedges_counts_once() -> None:
    tier = Tier(MODEL, parallel(ep_size=2), hedge_after_s=0.02)
    for link in tier.links:
        link.fails = "slow"
    batch = routing()
    running = asyncio.create_task(tier.run(batch))
    await asyncio.sleep(0.01)
    tier.links[0].answer_all()  # not what it is sent later
    await asyncio.sleep(0.05)
    assert [len(link.posted) for link in tier.links] == [2, 1]
    tier.links[1].answer_all()
    check(tier, batch, await running)


@pytest.mark.parametrize("first", ["original", "hedge"])
async def test_when_a_late_process_is_lost_its_hedges_count(first: str) -> None:
    tier = Tier(MODEL, parallel(ep_size=2), hedge_after_s=0.02)
    tier.links[0].fails = "slow"
    tier.links[1].fails = "slow"
    batch = routing()
    running = asyncio.create_task(tier.run(batch))
    await asyncio.sleep(0.01)
    tier.links[0].answer_all()
    await asyncio.sleep(0.05)
    tier.links[1].die()
    if first == "original":
        await asyncio.sleep(0.01)
    tier.links[0].answer_all()
    check(tier, batch, await running)


async def test_a_late_process_of_whose_experts_others_have_no_copy_is_waited_for() -> None:
    tier = Tier(MODEL, parallel(redundant=0), hedge_after_s=0.01)
    tier.links[2].fails = "slow"
    batch = routing()
    running = asyncio.create_task(tier.run(batch))
    await asyncio.sleep(0.1)
    assert not running.done()
    tier.links[2].answer_all()
    check(tier, batch, await running)


@pytest.mark.parametrize("failure", ["slow", "full"])
async def test_a_layer_takes_no_longer_than_its_deadline(failure: str) -> None:
    tier = Tier(MODEL, parallel(redundant=0), wait_s=0.1)
    tier.links[2].fails = failure
    started = asyncio.get_running_loop().time()
    result = await tier.run(routing())
    assert asyncio.get_running_loop().time() - started < 1.0
    reason = result.lost[0].reason
    assert "expert 2" in reason
    assert "phase" in reason
    assert "layer 1, experts 4, 5" in reason
    assert tier.unreleased() == []


async def test_a_process_without_a_free_slot_is_hedged_too() -> None:
    tier = Tier(MODEL, parallel(), hedge_after_s=0.02)
    tier.links[2].fails = "full"
    batch = routing()
    check(tier, batch, await tier.run(batch))


async def test_cancelling_a_rescue_leaves_no_task_and_releases_everything() -> None:
    tier = Tier(MODEL, parallel(), hedge_after_s=0.01)
    for link in tier.links:
        link.fails = "slow"
    before = asyncio.all_tasks()
    running = asyncio.create_task(tier.run(routing()))
    await asyncio.sleep(0.1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert asyncio.all_tasks() == before
    assert tier.unreleased() == []


async def test_a_process_whose_queue_is_long_gets_fewer_turns() -> None:
    tier = Tier(MODEL, parallel(ep_size=2))
    batch = routing(num_tokens=40)
    tier.links[0].queue_us = 40_000
    for step in range(12):
        await tier.run(batch, step=step)
    tier.peers._changed()
    before = len(tier.answers)
    check(tier, batch, await tier.run(batch, step=99))
    assert len(tier.answers) > before
    pairs = [
        int((answer.dispatch.physical_ids >= 0).sum())
        for link in tier.links
        for answer in link.posted[-1:]
    ]
    assert pairs[0] * 2 < pairs[1]


async def test_a_new_link_is_used_at_once() -> None:
    tier = Tier(MODEL, parallel())
    tier.links[2].fails = "posting"
    await tier.run(routing())
    fresh = type(tier.links[2])(tier, 2)
    tier.links[2] = fresh
    tier.peers.put(2, fresh)
    batch = routing()
    check(tier, batch, await tier.run(batch, step=1))
    assert fresh.posted
