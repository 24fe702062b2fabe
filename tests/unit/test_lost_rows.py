"""What the model runner and the group do with rows that nobody could compute."""

import torch

from attn_service.group_experts import GroupExperts, _encode
from attn_service.sequence import StepPlan
from moe_core.errors import PeerLostError
from support.recorded_model import FakeExperts, FakeGroup, Journal, plan, runner_of

STEP = ((1, 2, 3), (4,), (5, 6), (7,))


async def execute(step: StepPlan, loses: dict[tuple[int, int], tuple[int, ...]]):
    journal = Journal()
    experts = FakeExperts(journal, loses=loses)
    result = await runner_of(journal, experts).execute(step)
    assert journal.outstanding == set()
    return result, experts


async def test_a_sequence_of_which_a_row_is_lost_is_not_asked_for_again() -> None:
    result, experts = await execute(plan(1, *STEP), {(1, 0): (1, 5)})
    assert experts.asked == {(1, 0): None, (2, 0): [3, 6]}
    assert result.lost == {0: "layer 1 has no experts", 2: "layer 1 has no experts"}


async def test_the_others_logits_are_as_ever() -> None:
    whole, _ = await execute(plan(1, *STEP), {})
    result, _ = await execute(plan(1, *STEP), {(1, 0): (0,), (2, 0): (3,)})
    assert set(result.lost) == {0, 1}
    assert torch.equal(result.logits[2:], whole.logits[2:])


async def test_what_is_lost_is_told_by_its_place_in_the_plan() -> None:
    """The micro-batches are the slices 0 and 3, and 1 and 2."""
    one, two = "layer 1 has no experts", "layer 2 has no experts"
    result, _ = await execute(plan(2, *STEP), {(1, 0): (0,), (2, 0): (3,)})
    assert result.lost == {0: one, 3: two}
    result, experts = await execute(plan(2, *STEP), {(1, 1): (2,), (2, 0): (3,)})
    assert result.lost == {2: one, 3: two}
    assert experts.asked == {(1, 0): None, (1, 1): None, (2, 0): None, (2, 1): [0]}


async def test_the_first_reason_is_told() -> None:
    result, experts = await execute(plan(1, *STEP), {(1, 0): (3,), (2, 0): (4,)})
    assert result.lost == {1: "layer 1 has no experts", 2: "layer 2 has no experts"}
    assert experts.asked[2, 0] == [0, 1, 2, 4, 5, 6]


class TwoRanks(FakeGroup):
    """This rank's view of a group of two, of which the other has `flags` and says `text`."""

    def __init__(self, flags: list[float], text: torch.Tensor) -> None:
        super().__init__()
        self._flags = torch.tensor(flags)
        self._text = text

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x + self._flags

    def all_gather(self, x: torch.Tensor, sizes: object) -> torch.Tensor:
        return torch.cat((x, self._text))


def test_what_another_rank_has_lost_is_lost_here_too() -> None:
    group = TwoRanks([0.0, 0.0, 1.0, 1.0], _encode(PeerLostError("theirs")))
    experts = GroupExperts(FakeExperts(Journal()), group)  # type: ignore[arg-type]
    assert experts.settle({}, 3) == {1: "theirs", 2: "theirs"}
    assert experts.settle({0: "ours", 1: "ours too"}, 3) == {0: "ours", 1: "ours too", 2: "ours"}


def test_nothing_lost_costs_no_second_collective() -> None:
    group = TwoRanks([0.0] * 4, torch.empty(0))
    group.all_gather = None  # type: ignore[method-assign]  # would be called
    experts = GroupExperts(FakeExperts(Journal()), group)  # type: ignore[arg-type]
    assert experts.settle({}, 3) == {}
