"""The batcher: order, joining, and that one dispatch's mistake is nobody else's."""

import asyncio
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from expert_service.batcher import Batcher
from expert_service.expert_runner import ExpertRunner
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import EpserveError, ProtocolError
from moe_core.model.experts import run_experts_by_loop
from moe_core.placement import ExpertPlacement
from moe_core.transport.base import Dispatch, DispatchKey
from support.expert_tier import CPU, cut_layer, whole_layer
from support.moe_configs import moe_model

MODEL = moe_model(num_experts=8, top_k=2, num_layers=4)
PARALLEL = ParallelConfig(expert_devices=2, ep_size=2, shared_experts="expert").with_model(MODEL)
PLACEMENT = ExpertPlacement.initial(MODEL, PARALLEL)
EP_RANK = 1  # holds physical 4..7, and 9 for the shared expert
TIMEOUT_S = 10.0


@dataclass
class Answers:
    """What the replies of one test were told, in order."""

    log: list[str] = field(default_factory=list)
    partials: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, EpserveError] = field(default_factory=dict)
    times: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass
class RecordingReply:
    name: str
    answers: Answers

    def complete(self, partial: Tensor, queue_us: int, compute_us: int) -> None:
        self.answers.log.append(self.name)
        self.answers.partials[self.name] = partial.clone()
        self.answers.times[self.name] = (queue_us, compute_us)

    def fail(self, error: EpserveError) -> None:
        self.answers.log.append(self.name)
        self.answers.errors[self.name] = error


class CountingRunner(ExpertRunner):
    def __init__(self) -> None:
        weights = {
            layer.layer_id: cut_layer(
                whole_layer(MODEL, layer.layer_id, torch.float64),
                layer.logical_experts(EP_RANK),
                *(0, 1, True),
            )
            for layer in PLACEMENT.layers
        }
        super().__init__(weights, PLACEMENT, EP_RANK, CPU)
        self.runs: list[tuple[int, int]] = []  # layer, tokens
        self.breaks = False

    def run(self, layer_id: int, hidden: Tensor, local_ids: Tensor, topk_weights: Tensor) -> Tensor:
        if self.breaks:
            raise RuntimeError("out of memory")
        self.runs.append((layer_id, hidden.shape[0]))
        return super().run(layer_id, hidden, local_ids, topk_weights)


def dispatch(layer_id: int, physical_ids: list[list[int]], epoch: int = 0) -> Dispatch:
    generator = torch.Generator().manual_seed(layer_id)
    ids = torch.tensor(physical_ids, dtype=torch.int32).view(-1, 3)
    shape = (ids.shape[0], MODEL.hidden_size)
    hidden = torch.randn(shape, generator=generator, dtype=torch.float64)
    weights = torch.rand(ids.shape, generator=generator)
    return Dispatch(DispatchKey(epoch, 0, layer_id), hidden, ids, weights)


def expected(sent: Dispatch) -> Tensor:
    """The same from all logical experts; physical 9 is the shared one, whose local id is 8."""
    ids = torch.where(sent.physical_ids == 9, 8, sent.physical_ids)
    whole = whole_layer(MODEL, sent.key.layer_id, torch.float64)
    return run_experts_by_loop(whole, sent.hidden_states, ids, sent.topk_weights)


async def test_dispatches_of_one_layer_run_as_one_and_the_oldest_first() -> None:
    runner, answers = CountingRunner(), Answers()
    batcher = Batcher(runner)
    sent = {
        "a": dispatch(2, [[4, -1, 9], [-1, 5, -1]]),
        "b": dispatch(1, [[6, 7, -1]]),
        "c": dispatch(2, [[4, 7, -1], [-1, -1, 9], [5, -1, 9]]),
    }
    for name, each in sent.items():
        batcher.submit(each, RecordingReply(name, answers))
    assert not answers.log  # nothing runs inside the transport's callback
    await batcher.idle(TIMEOUT_S)
    assert runner.runs == [(2, 5), (1, 1)]
    assert answers.log == ["a", "c", "b"]
    for name, each in sent.items():
        torch.testing.assert_close(answers.partials[name], expected(each), rtol=1e-12, atol=1e-12)


async def test_answers_say_how_long_they_waited_and_computed() -> None:
    runner, answers = CountingRunner(), Answers()
    batcher = Batcher(runner)
    for layer_id in (1, 2):
        batcher.submit(dispatch(layer_id, [[4, 5, 9]]), RecordingReply(str(layer_id), answers))
    await batcher.idle(TIMEOUT_S)
    _, first_compute = answers.times["1"]
    second_queue, _ = answers.times["2"]
    assert first_compute > 0
    assert second_queue >= first_compute - 1  # rounded to whole microseconds


async def test_no_tokens_are_answered_with_no_rows() -> None:
    answers = Answers()
    batcher = Batcher(CountingRunner())
    batcher.submit(dispatch(1, []), RecordingReply("empty", answers))
    await batcher.idle(TIMEOUT_S)
    assert answers.partials["empty"].shape == (0, MODEL.hidden_size)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (dispatch(2, [[4, 3, -1]]), "physical ids 3 are not held by EP rank 1"),
        (dispatch(2, [[8, -1, -1]]), "physical ids 8"),  # another group's shared expert
        (dispatch(2, [[10, 4, 10]]), "physical ids 10"),
        (dispatch(2, [[-2, 4, 2**30]]), f"physical ids -2, {2**30}"),
        (dispatch(0, [[4, -1, -1]]), "layer 0 has no experts"),
        (dispatch(2, [[4, -1, -1]], epoch=7), "placement epoch 7"),
    ],
)
async def test_what_is_not_held_fails_alone(wrong: Dispatch, named: str) -> None:
    answers = Answers()
    batcher = Batcher(CountingRunner())
    right = dispatch(2, [[4, 5, -1]])
    batcher.submit(right, RecordingReply("right", answers))
    batcher.submit(wrong, RecordingReply("wrong", answers))
    await batcher.idle(TIMEOUT_S)
    assert isinstance(answers.errors["wrong"], ProtocolError)
    assert named in str(answers.errors["wrong"])
    torch.testing.assert_close(answers.partials["right"], expected(right), rtol=1e-12, atol=1e-12)
    assert not batcher.failed.done()


async def test_a_run_that_breaks_is_told_to_every_waiter_and_to_the_process() -> None:
    runner, answers = CountingRunner(), Answers()
    runner.breaks = True
    batcher = Batcher(runner)
    for name in ("a", "b"):
        batcher.submit(dispatch(2, [[4, 5, -1]]), RecordingReply(name, answers))
    await batcher.idle(TIMEOUT_S)
    assert sorted(answers.errors) == ["a", "b"]
    assert "layer 2" in str(answers.errors["a"])
    with pytest.raises(RuntimeError, match="out of memory"):
        await asyncio.wait_for(batcher.failed, TIMEOUT_S)


def test_weights_that_do_not_fit_the_placement_are_refused() -> None:
    whole = {
        layer.layer_id: whole_layer(MODEL, layer.layer_id, torch.float32)
        for layer in PLACEMENT.layers
    }
    with pytest.raises(ValueError, match="8 experts loaded, 4 placed"):
        ExpertRunner(whole, PLACEMENT, EP_RANK, CPU)
