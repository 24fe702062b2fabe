"""The order in which the model runner calls attention and experts, and what failures leave."""

import asyncio

import pytest
import torch

from attn_service.experts import Combined, PendingExperts
from attn_service.group_experts import AgreedTransportError, GroupExperts
from moe_core.errors import PeerLostError, UnavailableError
from support.recorded_model import (
    MOE_LAYERS,
    FakeExperts,
    FakeGroup,
    Journal,
    plan,
    runner_of,
)


class GatheringExperts(FakeExperts):
    """As ExpertClient does in a group: an answer that came is gathered."""

    def __init__(self, journal: Journal, group: FakeGroup, fails: str = "") -> None:
        super().__init__(journal, fails)
        self._group = group

    async def dispatch(self, key, layer_id, hidden, ids, weights, rows=None) -> PendingExperts:  # noqa: ANN001
        pending = await super().dispatch(key, layer_id, hidden, ids, weights, rows)
        combine = pending.combine

        async def gathered() -> Combined:
            answer, times, _ = await combine()
            own = -(-answer.shape[0] // 2)
            sizes = [own, answer.shape[0] - own]
            return Combined(self._group.all_gather(answer[:own], sizes), times)

        pending.combine = gathered  # type: ignore[method-assign]
        return pending


async def test_one_micro_batch_attends_while_another_waits_for_its_experts() -> None:
    journal = Journal()
    await runner_of(journal, FakeExperts(journal)).execute(plan(2, (1,), (2,)))
    at = {event: index for index, event in enumerate(journal.events)}
    for layer_id in MOE_LAYERS:
        assert at[f"dispatch {layer_id}.0"] < at[f"attend {layer_id}.1"]
        assert at[f"attend {layer_id}.1"] < at[f"answer {layer_id}.0"]
    # And the other way round: the next layer's first half, inside the second one's wait.
    assert at["dispatch 1.1"] < at["attend 2.0"] < at["answer 1.1"]


@pytest.mark.parametrize("slow", [0, 1])
async def test_the_order_of_calls_does_not_depend_on_who_is_answered_first(slow: int) -> None:
    class OneSlow(FakeExperts):
        async def dispatch(self, key, layer_id, hidden, ids, weights, rows=None):  # noqa: ANN001
            pending = await super().dispatch(key, layer_id, hidden, ids, weights, rows)
            pending._ready_at += 0.02 if key.microbatch == slow else -1.0
            return pending

    journal = Journal()
    await runner_of(journal, OneSlow(journal)).execute(plan(2, (1,), (2,)))
    assert journal.events == [
        *("attend 0.0", "attend 0.1"),
        *("attend 1.0", "dispatch 1.0", "attend 1.1", "dispatch 1.1"),
        *("answer 1.0", "attend 2.0", "dispatch 2.0"),
        *("answer 1.1", "attend 2.1", "dispatch 2.1"),
        *("answer 2.0", "answer 2.1"),
    ]


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_logits_are_in_the_plans_order(count: int) -> None:
    journal = Journal()
    step = plan(count, (1, 2), (3,), (4, 5, 6, 7), (8,), (9, 10, 11), without_logits=2)
    result = await runner_of(journal, FakeExperts(journal)).execute(step)
    layers = 100 * len(MOE_LAYERS)
    assert result.logits[:, 0].tolist() == [token + layers for token in (2, 3, 8, 11)]


async def test_the_times_of_all_dispatches_add_up() -> None:
    journal = Journal()
    times = (await runner_of(journal, FakeExperts(journal)).execute(plan(2, (1,), (2,)))).times
    dispatches = 2 * len(MOE_LAYERS)
    assert (times.steps, times.step_s, times.sampling_s) == (1, 0.0, 0.0)
    assert (times.expert_wait_s, times.expert_queue_s) == (0.5 * dispatches, 0.25 * dispatches)
    assert (times.expert_compute_s, times.combine_s) == (0.125 * dispatches, 0.0625 * dispatches)
    assert times.attention_s > 0
    assert times.dispatch_s > 0


@pytest.mark.parametrize("what", ["answer 1.0", "answer 1.2", "dispatch 1.1", "dispatch 2.0"])
async def test_a_step_that_the_experts_fail_leaves_no_dispatch_behind(what: str) -> None:
    journal = Journal()
    with pytest.raises(PeerLostError, match="expert 0 is gone"):
        await runner_of(journal, FakeExperts(journal, what)).execute(plan(3, (1,), (2,), (3,)))
    assert any(event.startswith("dispatch") for event in journal.events)
    assert journal.outstanding == set()


async def test_a_step_that_fails_elsewhere_leaves_no_dispatch_behind() -> None:
    journal = Journal()
    runner = runner_of(journal, FakeExperts(journal))
    runner._decoder.layers[1].fails_in_shared = True
    with pytest.raises(UnavailableError, match="the group is lost"):
        await runner.execute(plan(2, (1,), (2,)))
    assert journal.events[-1] == "dispatch 1.0"
    assert journal.outstanding == set()


async def test_a_cancelled_step_leaves_no_dispatch_behind() -> None:
    journal = Journal()
    runner = runner_of(journal, FakeExperts(journal))
    step = asyncio.create_task(runner.execute(plan(2, (1,), (2,))))
    await asyncio.sleep(0)
    assert journal.outstanding == {(1, 0), (1, 1)}
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    assert journal.outstanding == set()


@pytest.mark.parametrize("what", ["answer 1.0", "answer 1.1", "dispatch 1.1", "dispatch 2.0"])
async def test_a_rank_whose_experts_fail_makes_the_groups_collectives_all_the_same(
    what: str,
) -> None:
    calls = []
    for fails in ("", what):
        journal, group = Journal(), FakeGroup()
        experts = GroupExperts(GatheringExperts(journal, group, fails), group)  # type: ignore[arg-type]
        runner = runner_of(journal, experts, group)
        await runner.execute(plan(2, (1, 2, 3), (4,), (5,)))
        calls.append(tuple(group.calls))
        assert journal.outstanding == set()
        group.all_reduce = lambda x: x  # type: ignore[method-assign]  # what the others would say
        group.all_gather = lambda x, sizes: torch.cat((x, x))  # type: ignore[method-assign]
        if fails:
            with pytest.raises(AgreedTransportError, match="expert 0 is gone"):
                experts.settle({}, 3)
        else:
            experts.settle({}, 3)
    assert calls[0] == calls[1]
    assert ("all_gather", (2, 1)) in calls[0]
