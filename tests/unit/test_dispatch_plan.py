"""Who is sent what: each chosen expert exactly once, and never a row too many."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attn_service.dispatch_plan import (
    GroupDispatch,
    plan_dispatch,
    with_shared_weight,
)
from attn_service.replica_choice import LayerTables
from moe_core.config.parallel import ParallelConfig
from moe_core.placement import ExpertPlacement, LayerPlacement
from support.moe_configs import moe_model
from support.patience import patient


@dataclass(frozen=True)
class Case:
    layer: LayerPlacement
    ep_size: int
    level: int
    shared: bool
    topk_ids: Tensor
    first_token: int

    def plan(self) -> list[GroupDispatch]:
        tables = LayerTables.build(self.layer, self.ep_size, torch.device("cpu"))
        return plan_dispatch(tables, self.topk_ids, self.level, self.shared, self.first_token)

    def tokens_of(self, group: GroupDispatch) -> list[int]:
        if group.rows is None:
            return list(range(self.topk_ids.shape[0]))
        return [int(row) for row in group.rows]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ep_size = draw(st.sampled_from([1, 2, 4, 8]))
    num_experts = draw(st.integers(1, 12))
    redundant = draw(st.integers(0, num_experts * (ep_size - 1)))
    parallel = ParallelConfig(
        expert_devices=ep_size, ep_size=ep_size, num_redundant_experts=redundant
    )
    layer = ExpertPlacement.initial(moe_model(num_experts=num_experts), parallel).layers[0]
    top_k = draw(st.integers(1, min(4, num_experts)))
    rows = st.permutations(range(num_experts)).map(lambda order: order[:top_k])
    topk_ids = torch.tensor(draw(st.lists(rows, max_size=6)), dtype=torch.int64).view(-1, top_k)
    level = draw(st.sampled_from([1, 2])) if ep_size > 1 else draw(st.sampled_from([0, 1, 2]))
    return Case(layer, ep_size, level, draw(st.booleans()), topk_ids, draw(st.integers(0, 99)))


@patient
@given(cases())
def test_every_chosen_expert_is_computed_exactly_once(case: Case) -> None:
    """The shared expert counts as one more that every token has chosen."""
    shared = -7
    computed: Counter[tuple[int, int]] = Counter()
    for group in case.plan():
        for token, physical_ids in zip(
            case.tokens_of(group), group.physical_ids.tolist(), strict=True
        ):
            for physical in physical_ids:
                if physical == case.layer.shared_physical_id(group.ep_rank):
                    computed[token, shared] += 1
                elif physical >= 0:
                    assert case.layer.physical_to_ep_rank[physical] == group.ep_rank
                    computed[token, case.layer.physical_to_logical[physical]] += 1
    chosen = {(t, e) for t, row in enumerate(case.topk_ids.tolist()) for e in row}
    if case.shared:
        chosen |= {(token, shared) for token in range(case.topk_ids.shape[0])}
    assert computed == Counter(chosen)


@patient
@given(cases())
def test_a_column_keeps_its_weight(case: Case) -> None:
    """Column c of physical_ids is expert c of the router's choice, wherever it is computed."""
    weights = with_shared_weight(torch.ones(case.topk_ids.shape), case.shared)
    for group in case.plan():
        assert group.physical_ids.dtype == torch.int32
        assert group.physical_ids.shape[1] == weights.shape[1]
        for token, physical_ids in zip(
            case.tokens_of(group), group.physical_ids.tolist(), strict=True
        ):
            for column, physical in enumerate(physical_ids[: case.topk_ids.shape[1]]):
                if physical >= 0:
                    logical = case.layer.physical_to_logical[physical]
                    assert logical == case.topk_ids[token, column]


@patient
@given(cases())
def test_below_level_2_every_group_gets_every_row(case: Case) -> None:
    if case.level == 2 or case.topk_ids.shape[0] == 0:
        return
    plan = case.plan()
    assert [group.ep_rank for group in plan] == list(range(case.ep_size))
    assert all(len(case.tokens_of(group)) == case.topk_ids.shape[0] for group in plan)


@patient
@given(cases())
def test_at_level_2_rows_go_once_to_groups_that_compute_them_and_nowhere_else(case: Case) -> None:
    if case.level != 2:
        return
    plan = case.plan()
    ranks = [group.ep_rank for group in plan]
    assert ranks == sorted(set(ranks))
    for group in plan:
        assert group.physical_ids.shape[0] > 0
        assert bool((group.physical_ids >= 0).any(dim=1).all())
        tokens = case.tokens_of(group)
        assert tokens == sorted(set(tokens))


@patient
@given(cases())
def test_at_level_2_the_shared_expert_adds_no_row(case: Case) -> None:
    if case.level != 2:
        return
    without = Case(case.layer, case.ep_size, 2, False, case.topk_ids, case.first_token)
    rows = [(g.ep_rank, case.tokens_of(g)) for g in case.plan()]
    assert rows == [(g.ep_rank, case.tokens_of(g)) for g in without.plan()]


@pytest.mark.parametrize("level", [1, 2])
def test_copies_and_the_shared_expert_take_turns(level: int) -> None:
    parallel = ParallelConfig(expert_devices=4, ep_size=4, num_redundant_experts=24)
    layer = ExpertPlacement.initial(moe_model(num_experts=8), parallel).layers[0]
    case = Case(layer, 4, level, True, torch.tensor([[3, 5]] * 64), 0)
    used = Counter(p for g in case.plan() for row in g.physical_ids.tolist() for p in row if p >= 0)
    for expert in (3, 5):
        assert [used[p] for p in layer.replicas(expert)] == [16] * 4
    assert [used[layer.shared_physical_id(rank)] for rank in range(4)] == [16] * 4


def test_no_tokens_make_no_message() -> None:
    layer = ExpertPlacement.initial(moe_model(), ParallelConfig()).layers[0]
    assert Case(layer, 1, 0, True, torch.empty(0, 2, dtype=torch.int64), 0).plan() == []
