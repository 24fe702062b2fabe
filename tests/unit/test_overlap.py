"""The order in which the model runner calls attention and experts, and what failures leave behind.

The decoder is a recorder: layers 1 and 2 have experts, layer 0 is dense. A micro-batch is told by
its first token.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from attn_service.experts import Combined, Experts, ExpertTimes, PendingExperts, StepKey
from attn_service.group_experts import AgreedTransportError, GroupExperts
from attn_service.model_runner import ModelRunner
from attn_service.sequence import SequenceSlice, StepPlan
from moe_core.errors import PeerLostError, UnavailableError

CPU = torch.device("cpu")
ANSWER_S = 0.005
MOE_LAYERS = (1, 2)


@dataclass
class Journal:
    """outstanding: dispatches, as (layer, micro-batch), neither combined nor released."""

    events: list[str] = field(default_factory=list)
    outstanding: set[tuple[int, int]] = field(default_factory=set)

    def note(self, what: str, layer_id: int, microbatch: int) -> None:
        self.events.append(f"{what} {layer_id}.{microbatch}")


class FakeLayer:
    def __init__(self, layer_id: int, journal: Journal, tp: "FakeGroup") -> None:
        self.layer_id = layer_id
        self.is_moe = layer_id in MOE_LAYERS
        self.fails_in_shared = False
        self._journal = journal
        self._tp = tp

    def attend(self, hidden: Tensor, batch: object, cache: object) -> tuple[Tensor, Tensor]:
        self._journal.note("attend", self.layer_id, int(hidden[0, 1]))
        return self._tp.all_reduce(hidden), hidden

    def dense(self, residual: Tensor, hidden: Tensor) -> Tensor:
        return residual

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden.long(), hidden

    def shared(self, hidden: Tensor) -> None:
        if self.fails_in_shared:
            raise UnavailableError("the group is lost")

    def finish(self, residual: Tensor, routed: Tensor, shared: None) -> Tensor:
        return routed


class FakeDecoder:
    """hidden rows are (token, micro-batch); a layer's experts add 100 to the token."""

    def __init__(self, journal: Journal, tp: "FakeGroup") -> None:
        self.layers = [FakeLayer(layer_id, journal, tp) for layer_id in range(3)]
        self._embedded = 0

    def embed(self, token_ids: Tensor) -> Tensor:
        microbatch = torch.full_like(token_ids, self._embedded)
        self._embedded += 1
        return torch.stack((token_ids, microbatch), dim=1).double()

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


class FakeExperts:
    """Answers ANSWER_S after the dispatch, except what `fails` names: "dispatch 2.1", say."""

    def __init__(self, journal: Journal, fails: str = "") -> None:
        self._journal = journal
        self._fails = fails

    async def dispatch(
        self,
        key: StepKey,
        layer_id: int,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        rows: Tensor | None = None,
    ) -> PendingExperts:
        self.fail_if_named("dispatch", layer_id, key.microbatch)
        self._journal.note("dispatch", layer_id, key.microbatch)
        self._journal.outstanding.add((layer_id, key.microbatch))
        return FakePending(self, self._journal, (layer_id, key.microbatch), hidden)

    def fail_if_named(self, what: str, layer_id: int, microbatch: int) -> None:
        if self._fails == f"{what} {layer_id}.{microbatch}":
            raise PeerLostError(f"expert 0 is gone: layer {layer_id}")


class FakePending:
    def __init__(
        self, experts: FakeExperts, journal: Journal, which: tuple[int, int], hidden: Tensor
    ) -> None:
        self._experts = experts
        self._journal = journal
        self._which = which
        self._answer = hidden + torch.tensor([100.0, 0.0])
        self._ready_at = asyncio.get_running_loop().time() + ANSWER_S

    async def combine(self) -> Combined:
        try:
            await asyncio.sleep(max(0.0, self._ready_at - asyncio.get_running_loop().time()))
            self._experts.fail_if_named("answer", *self._which)
        finally:
            self._journal.outstanding.remove(self._which)
        self._journal.note("answer", *self._which)
        return Combined(self._answer, ExpertTimes(0.5, 0.25, 0.125, 0.0625))

    def release(self) -> None:
        self._journal.outstanding.discard(self._which)


class FakeGroup:
    """This rank's view of a group of two; what it would wait for, it makes up."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def all_reduce(self, x: Tensor) -> Tensor:
        self.calls.append(("all_reduce", tuple(x.shape)))
        return x

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        self.calls.append(("all_gather", tuple(sizes)))
        return x.new_zeros((sum(sizes), *x.shape[1:]))


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


def runner_of(journal: Journal, experts: Experts, tp: FakeGroup | None = None) -> ModelRunner:
    decoder = FakeDecoder(journal, tp or FakeGroup())
    return ModelRunner(decoder, SimpleNamespace(block_size=4, layers=()), experts, CPU)  # type: ignore[arg-type]


def plan(num_microbatches: int, *tokens: tuple[int, ...], without_logits: int = -1) -> StepPlan:
    parts = tuple(
        SequenceSlice(each, 0, tuple(range(10)), needs_logits=index != without_logits)
        for index, each in enumerate(tokens)
    )
    return StepPlan(1, 0, parts, num_microbatches)


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
