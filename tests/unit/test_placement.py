"""Epoch 0's placement: balanced, no copy beside its twin, and consistent lookups."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ConfigError
from moe_core.placement import ExpertPlacement, LayerPlacement
from support.moe_configs import moe_model
from support.patience import patient


@st.composite
def placements(draw: st.DrawFn) -> tuple[ExpertPlacement, ParallelConfig]:
    num_experts = draw(st.integers(1, 40))
    ep_size = draw(st.sampled_from([1, 2, 4, 8, 16]))
    most = num_experts * (ep_size - 1)
    redundant = draw(st.integers(0, most) | st.integers(0, min(most, num_experts)))
    parallel = ParallelConfig(
        expert_devices=ep_size, ep_size=ep_size, num_redundant_experts=redundant
    )
    return ExpertPlacement.initial(moe_model(num_experts=num_experts), parallel), parallel


def held_by(layer: LayerPlacement, ep_size: int) -> list[tuple[int, ...]]:
    return [layer.logical_experts(rank) for rank in range(ep_size)]


@patient
@given(placements())
def test_slots_per_process_differ_by_at_most_one(
    drawn: tuple[ExpertPlacement, ParallelConfig],
) -> None:
    placement, parallel = drawn
    for layer in placement.layers:
        counts = list(map(len, held_by(layer, parallel.ep_size)))
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == placement.num_logical_experts + parallel.num_redundant_experts


@patient
@given(placements())
def test_every_expert_is_held_and_its_copies_are_on_different_groups(
    drawn: tuple[ExpertPlacement, ParallelConfig],
) -> None:
    placement, parallel = drawn
    for layer in placement.layers:
        copies = Counter(e for group in held_by(layer, parallel.ep_size) for e in set(group))
        assert set(copies) == set(range(placement.num_logical_experts))
        assert sum(copies.values()) == layer.num_physical
        assert max(copies.values()) - min(copies.values()) <= 1


@patient
@given(placements())
def test_lookups_agree_with_the_tables(drawn: tuple[ExpertPlacement, ParallelConfig]) -> None:
    placement, parallel = drawn
    layer = placement.layers[0]
    for rank in range(parallel.ep_size):
        physical = layer.physical_experts(rank)
        assert list(physical) == sorted(physical)
        assert all(layer.physical_to_ep_rank[p] == rank for p in physical)
        assert layer.shared_physical_id(rank) == layer.num_physical + rank
    for logical in range(placement.num_logical_experts):
        replicas = layer.replicas(logical)
        assert list(replicas) == sorted(replicas)
        assert all(layer.physical_to_logical[p] == logical for p in replicas)


def test_first_copies_are_neighbours_and_second_copies_far_from_home() -> None:
    parallel = ParallelConfig(expert_devices=4, ep_size=4, num_redundant_experts=4)
    placement = ExpertPlacement.initial(moe_model(num_experts=8), parallel)
    assert held_by(placement.layer(1), 4) == [(0, 1, 4), (2, 3, 6), (0, 4, 5), (2, 6, 7)]


def test_only_layers_with_experts_are_placed() -> None:
    placement = ExpertPlacement.initial(moe_model(num_layers=4), ParallelConfig())
    assert [layer.layer_id for layer in placement.layers] == [1, 2, 3]
    assert placement.num_local_experts(0) == 8


@pytest.mark.parametrize(
    ("logical", "holders", "rule"),
    [
        ((0, 1), (0,), "2 physical slots, but 1 holders"),
        ((0, 0), (0, 1), "exactly the experts 0 to 1"),
        ((0, 2), (0, 1), "exactly the experts 0 to 1"),
        ((0, 1), (0, 2), "below ep_size=2"),
        ((0, 1, 0), (0, 1, 0), "different EP groups"),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    logical: tuple[int, ...], holders: tuple[int, ...], rule: str
) -> None:
    with pytest.raises(ConfigError, match=rule):
        ExpertPlacement(3, 2, 2, (LayerPlacement(1, logical, holders),))


def test_placement_needs_no_torch() -> None:
    check = "import moe_core.placement, moe_core.cluster, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0
