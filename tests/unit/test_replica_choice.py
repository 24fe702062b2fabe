"""Which copy computes what, however the groups stand; and who computes what a group has failed."""

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_service.dispatch_plan import GroupDispatch, plan_again, plan_dispatch
from attn_service.placements import MAX_STANDINGS, Placements
from attn_service.replica_choice import (
    ALL_USUAL,
    AVOIDED,
    BUSY,
    DOWN,
    USUAL,
    LayerTables,
    Standing,
    choose_physical,
)
from moe_core.config.parallel import ParallelConfig
from moe_core.placement import ExpertPlacement, LayerPlacement
from support.moe_configs import moe_model
from support.patience import patient

CPU = torch.device("cpu")
EP_SIZE, NUM_EXPERTS, TOP_K = 4, 8, 3
STANDINGS = st.tuples(*[st.sampled_from([DOWN, AVOIDED, BUSY, USUAL])] * EP_SIZE)
ROUTINGS = st.lists(
    st.permutations(range(NUM_EXPERTS)).map(lambda order: order[:TOP_K]), min_size=1, max_size=6
).map(torch.tensor)


def placed(redundant: int) -> ExpertPlacement:
    parallel = ParallelConfig(
        expert_devices=EP_SIZE, ep_size=EP_SIZE, num_redundant_experts=redundant
    )
    return ExpertPlacement.initial(moe_model(num_experts=NUM_EXPERTS), parallel)


def layer_of(redundant: int) -> LayerPlacement:
    return placed(redundant).layers[0]


def stands(layer: LayerPlacement, expert: int, standing: Standing) -> list[int]:
    return [standing[layer.physical_to_ep_rank[slot]] for slot in layer.replicas(expert)]


@patient
@given(st.integers(0, 24), STANDINGS, st.integers(0, 50))
def test_copies_are_chosen_as_their_groups_stand(
    redundant: int, standing: Standing, first: int
) -> None:
    layer = layer_of(redundant)
    tables = LayerTables.build(layer, EP_SIZE, CPU, standing)
    for expert in range(NUM_EXPERTS):
        able = [each for each in stands(layer, expert, standing) if each != DOWN]
        assert (tables.lost is not None and bool(tables.lost[expert])) == (not able)
        chosen = choose_physical(tables, torch.full((60, 1), expert), first)[:, 0].tolist()
        if not able:
            assert set(chosen) == {-1}
            continue
        used = {standing[layer.physical_to_ep_rank[slot]] for slot in chosen}
        assert used == ({each for each in able if each != AVOIDED} or {AVOIDED})


@patient
@given(st.integers(0, 24), STANDINGS, ROUTINGS, st.booleans(), st.sampled_from([1, 2]))
def test_what_is_planned_is_complete_and_asks_nobody_who_is_down(
    redundant: int, standing: Standing, routing: torch.Tensor, shared: bool, level: int
) -> None:
    layer = layer_of(redundant)
    tables = LayerTables.build(layer, EP_SIZE, CPU, standing)
    if tables.lost is not None:
        routing = routing[~tables.lost[routing].any(dim=1)]
    plan = plan_dispatch(tables, routing, level, shared)
    assert all(standing[group.ep_rank] != DOWN for group in plan)
    assert computed(layer, plan, len(routing)) == wanted(routing, shared)


@patient
@given(st.integers(0, 24), STANDINGS, ROUTINGS, st.booleans(), st.sampled_from([1, 2]), st.data())
def test_what_a_group_failed_is_done_by_others_exactly_once(
    redundant: int,
    standing: Standing,
    routing: torch.Tensor,
    shared: bool,
    level: int,
    data: st.DataObject,
) -> None:
    layer = layer_of(redundant)
    plan = plan_dispatch(LayerTables.build(layer, EP_SIZE, CPU), routing, level, shared)
    failed = data.draw(st.sampled_from(plan))
    standing = tuple(DOWN if g == failed.ep_rank else s for g, s in enumerate(standing))
    tables = LayerTables.build(layer, EP_SIZE, CPU, standing)
    again, uncovered = plan_again(tables, failed, len(routing), 5)
    rows = list(range(len(routing))) if failed.rows is None else failed.rows.tolist()
    lost = {rows[position] for position in uncovered.tolist()}
    had = computed(layer, [failed], len(routing))
    for row, expert in had:
        able = expert is None or any(s != DOWN for s in stands(layer, expert, standing))
        assert able or row in lost
    kept = Counter({pair: n for pair, n in had.items() if pair[0] not in lost})
    assert computed(layer, again, len(routing)) == kept
    assert all(bool((group.physical_ids >= 0).any(dim=1).all()) for group in again)
    assert all(standing[group.ep_rank] != DOWN for group in again)


def wanted(routing: torch.Tensor, shared: bool) -> Counter[tuple[int, int | None]]:
    pairs = [(row, expert) for row, ids in enumerate(routing.tolist()) for expert in ids]
    return Counter([*pairs, *((row, None) for row in range(len(routing)) if shared)])


def computed(
    layer: LayerPlacement, groups: list[GroupDispatch], num_tokens: int
) -> Counter[tuple[int, int | None]]:
    """(row, expert) pairs, the shared expert being None."""
    found: Counter[tuple[int, int | None]] = Counter()
    for group in groups:
        rows = range(num_tokens) if group.rows is None else group.rows.tolist()
        for row, ids in zip(rows, group.physical_ids.tolist(), strict=True):
            for physical in ids:
                if physical == layer.shared_physical_id(group.ep_rank):
                    found[row, None] += 1
                elif physical >= 0:
                    assert layer.physical_to_ep_rank[physical] == group.ep_rank
                    found[row, layer.physical_to_logical[physical]] += 1
    return found


def test_a_busy_group_gets_a_quarter_of_the_turns() -> None:
    layer = layer_of(NUM_EXPERTS)
    slots = layer.replicas(0)
    busy = layer.physical_to_ep_rank[slots[0]]
    standing = tuple(BUSY if group == busy else USUAL for group in range(EP_SIZE))
    tables = LayerTables.build(layer, EP_SIZE, CPU, standing)
    chosen = choose_physical(tables, torch.zeros(100, 1, dtype=torch.int64), 0)[:, 0].tolist()
    assert [chosen.count(slot) for slot in slots] == [20, 80]


def test_tables_for_few_standings_are_kept() -> None:
    placements = Placements(placed(NUM_EXPERTS), CPU)
    usual = placements.tables(0, 1)
    for number in range(3 * MAX_STANDINGS):
        standing = tuple(USUAL if number >> bit & 1 else BUSY for bit in range(EP_SIZE))
        assert placements.tables(0, 1, standing) is placements.tables(0, 1, standing)
        assert len(placements._tables) <= MAX_STANDINGS + 1
    assert placements.tables(0, 1, ALL_USUAL) is usual
    placements.forget_before(1)
    assert placements.tables(0, 1) is usual  # the newest always stays
