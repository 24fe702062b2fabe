"""Several placements at once: what is served, what is held, and what may be let go."""

import asyncio
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from expert_service.batcher import Batcher
from expert_service.expert_runner import ExpertRunner
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import EpserveError, ProtocolError
from moe_core.model.experts import run_experts_by_loop
from moe_core.model.matrix_forms import MatrixForm
from moe_core.model.weight_forms import expert_in_form
from moe_core.model.weights import ExpertLayerWeights, ExpertWeights
from moe_core.placement import ExpertPlacement
from moe_core.transport.base import Dispatch, DispatchKey
from support.expert_tier import CPU, cut_layer, random_routing, whole_layer
from support.matrix_forms import ARRANGED
from support.moe_configs import moe_model
from support.placements import after

MODEL = moe_model(num_experts=8, top_k=2, num_layers=3)
PARALLEL = ParallelConfig(expert_devices=2, ep_size=2, shared_experts="expert").with_model(MODEL)
FIRST = ExpertPlacement.initial(MODEL, PARALLEL)  # 0..3 and 4..7 in layers 1 and 2
SECOND = after(FIRST, {2: [[0, 1, 7, 3], [4, 5, 6, 2]]})
EP_RANK = 1
TIMEOUT_S = 10.0


def stored(
    layer_id: int, experts: Iterable[int], dtype: torch.dtype = torch.float64
) -> ExpertLayerWeights:
    return cut_layer(whole_layer(MODEL, layer_id, dtype), tuple(experts), 0, 1, True)


def one(layer_id: int, logical: int, dtype: torch.dtype = torch.float64) -> ExpertWeights:
    layer = stored(layer_id, [logical], dtype)
    return ExpertWeights(layer.w13[0], layer.w2[0])


def make_runner(
    placement: ExpertPlacement = FIRST, ep_rank: int = EP_RANK, dtype: torch.dtype = torch.float64
) -> ExpertRunner:
    weights = {
        layer.layer_id: stored(layer.layer_id, layer.logical_experts(ep_rank), dtype)
        for layer in placement.layers
    }
    return ExpertRunner(weights, placement, ep_rank, CPU)


def run(runner: ExpertRunner, epoch: int, layer_id: int, ids: list[list[int]]) -> Tensor:
    physical = torch.tensor(ids, dtype=torch.int32)
    hidden = random_routing(MODEL, len(ids), torch.float64, 3).hidden
    local = runner.local_ids(epoch, layer_id, physical)
    return runner.run(layer_id, hidden, local, torch.ones(physical.shape))


def expected(layer_id: int, logical: list[list[int]]) -> Tensor:
    hidden = random_routing(MODEL, len(logical), torch.float64, 3).hidden
    ids = torch.tensor(logical)
    whole = whole_layer(MODEL, layer_id, torch.float64)
    return run_experts_by_loop(whole, hidden, ids, torch.ones(ids.shape))


def test_only_what_a_placement_adds_is_lacking() -> None:
    assert make_runner().lacking(SECOND) == ((2, 2),)


def test_a_placement_is_served_once_its_experts_are_there() -> None:
    runner = make_runner()
    with pytest.raises(ValueError, match="placement epoch 1: 1 experts lack"):
        runner.serve(SECOND)
    runner.put(2, 2, one(2, 2))
    runner.serve(SECOND)
    # Slot 7 is expert 7 in the first placement, and 2 in the second; 9 is the shared expert.
    same = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(run(runner, 0, 2, [[7, 9]]), expected(2, [[7, 8]]), **same)
    torch.testing.assert_close(run(runner, 1, 2, [[7, 9]]), expected(2, [[2, 8]]), **same)
    torch.testing.assert_close(run(runner, 1, 1, [[7, 4]]), expected(1, [[7, 4]]), **same)


def test_an_epoch_that_is_not_held_is_refused_and_those_that_are_are_named() -> None:
    runner = make_runner()
    runner.put(2, 2, one(2, 2))
    runner.serve(SECOND)
    with pytest.raises(ProtocolError, match=r"placement epoch 2 is not held by EP rank 1.* 0, 1$"):
        run(runner, 2, 2, [[7, -1]])
    runner.retain([SECOND])
    with pytest.raises(ProtocolError, match=r"placement epoch 0 is not held by EP rank 1.* 1$"):
        run(runner, 0, 2, [[7, -1]])


def test_what_no_placement_needs_is_dropped_and_the_rest_stays_as_it_was() -> None:
    runner = make_runner()
    runner.put(2, 2, one(2, 2))
    runner.serve(SECOND)
    assert runner.num_experts == 9
    kept = runner.expert(2, 5)
    runner.retain([FIRST, SECOND])
    assert runner.num_experts == 9
    assert runner.retain([SECOND]) == 1
    assert runner.expert(2, 7) is None
    assert kept is not None
    assert runner.expert(2, 5) == kept


def test_a_placement_that_is_withdrawn_leaves_nothing_behind() -> None:
    runner = make_runner()
    runner.put(2, 2, one(2, 2))
    runner.retain([FIRST])
    assert runner.num_experts == 8
    assert runner.served == (FIRST,)


def test_another_placement_of_the_same_epoch_takes_its_place() -> None:
    runner = make_runner()
    runner.put(2, 2, one(2, 2))
    runner.serve(SECOND)
    other = after(FIRST, {2: [[0, 1, 2, 7], [4, 5, 6, 3]]})
    runner.retain([FIRST, other])
    assert runner.served == (FIRST,)
    assert runner.lacking(other) == ((2, 3),)


def test_a_rank_beyond_the_placement_begins_with_nothing() -> None:
    runner = make_runner(FIRST, ep_rank=2)
    assert runner.num_experts == 0
    with pytest.raises(ProtocolError, match=r"physical ids 4 are not held by EP rank 2.*none"):
        run(runner, 0, 2, [[4, -1]])
    wider = after(FIRST, {2: [[0, 1], [4, 5, 6], [2, 3, 7]]}, ep_size=3)
    assert runner.lacking(wider) == ((2, 2), (2, 3), (2, 7))
    for layer_id, logical in runner.lacking(wider):
        runner.put(layer_id, logical, one(layer_id, logical))
    runner.serve(wider)
    # 10 is this group's copy of the shared expert.
    actual = run(runner, 1, 2, [[7, 10], [5, -1]])
    torch.testing.assert_close(actual, expected(2, [[7, 8], [2, -1]]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ARRANGED)
def test_experts_in_a_form_move_like_plain_ones(form: MatrixForm) -> None:
    runner = make_runner(dtype=torch.bfloat16)
    runner.put(2, 2, expert_in_form(one(2, 2, torch.bfloat16), form))
    runner.serve(SECOND)
    hidden = random_routing(MODEL, 2, torch.bfloat16, 3).hidden
    ids = torch.tensor([[7, 4], [6, 5]], dtype=torch.int32)
    scale = torch.ones(ids.shape)
    actual = runner.run(2, hidden, runner.local_ids(1, 2, ids), scale)
    whole = whole_layer(MODEL, 2, torch.bfloat16)
    wanted = run_experts_by_loop(whole, hidden, torch.tensor([[2, 4], [6, 5]]), scale)
    torch.testing.assert_close(actual, wanted, rtol=2e-2, atol=2e-2)


class Answer:
    def __init__(self) -> None:
        self.partial: Tensor | None = None
        self.error: EpserveError | None = None
        self.source_epoch = 1

    def complete(self, partial: Tensor, queue_us: int, compute_us: int) -> None:
        self.partial = partial.clone()

    def fail(self, error: EpserveError) -> None:
        self.error = error


def dispatch(epoch: int, physical: list[list[int]]) -> Dispatch:
    ids = torch.tensor(physical, dtype=torch.int32)
    hidden = random_routing(MODEL, len(physical), torch.float64, 3).hidden
    return Dispatch(DispatchKey(epoch, 0, 2), hidden, ids, torch.ones(ids.shape))


async def test_dispatches_of_two_placements_run_as_one() -> None:
    runner = make_runner()
    runner.put(2, 2, one(2, 2))
    runner.serve(SECOND)
    batcher = Batcher(runner)
    old, new = Answer(), Answer()
    batcher.submit(dispatch(0, [[7, 4]]), old)
    batcher.submit(dispatch(1, [[7, 4]]), new)
    await batcher.idle(TIMEOUT_S)
    assert old.partial is not None
    assert new.partial is not None
    torch.testing.assert_close(old.partial, expected(2, [[7, 4]]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new.partial, expected(2, [[2, 4]]), rtol=1e-12, atol=1e-12)


async def test_nothing_is_dropped_while_a_dispatch_that_needs_it_waits() -> None:
    runner = make_runner()
    runner.put(2, 2, one(2, 2))
    runner.serve(SECOND)
    batcher = Batcher(runner)
    answer = Answer()
    batcher.submit(dispatch(0, [[7, 4]]), answer)
    assert not batcher.retain([SECOND])
    assert runner.served == (FIRST, SECOND)
    await batcher.idle(TIMEOUT_S)
    assert answer.partial is not None
    torch.testing.assert_close(answer.partial, expected(2, [[7, 4]]), rtol=1e-12, atol=1e-12)
    assert batcher.retain([SECOND])
    late = Answer()
    batcher.submit(dispatch(0, [[7, 4]]), late)
    await asyncio.sleep(0)
    assert isinstance(late.error, ProtocolError)
