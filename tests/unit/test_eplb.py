"""Balancing experts: the published method's behaviour, and what must hold of every outcome."""

import random
from itertools import pairwise, permutations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_core.eplb import (
    Held,
    balanced,
    imbalance,
    least_moved,
    num_moved,
    resized,
)
from moe_core.even_parts import even_parts

# The example of the EPLB project's README: two layers, 16 slots, 4 groups of experts, 2 nodes and
# 8 GPUs; below it what it prints.
PUBLISHED_LOADS = (
    (90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86),
    (20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27),
)
PUBLISHED_SLOTS = (
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
)


def trivial(num_experts: int, ep_size: int) -> list[list[int]]:
    """Contiguous, without copies."""
    ends = [num_experts * rank // ep_size for rank in range(ep_size + 1)]
    return [list(range(*pair)) for pair in pairwise(ends)]


def zipf(num_experts: int, seed: int, exponent: float = 1.0) -> list[float]:
    load = [1e6 / (rank + 1) ** exponent for rank in range(num_experts)]
    random.Random(seed).shuffle(load)
    return load


def check(held: Held, num_experts: int, num_slots: int, ep_size: int) -> None:
    assert [len(group) for group in held] == even_parts(num_slots, ep_size)
    assert {expert for group in held for expert in group} == set(range(num_experts))
    for group in held:
        assert len(set(group)) == len(group), held


@st.composite
def tiers(draw: st.DrawFn) -> tuple[list[float], int, int]:
    """Loads, slots and EP groups that a layer may have."""
    load = draw(st.lists(st.integers(0, 10**6).map(float), min_size=1, max_size=24))
    ep_size = draw(st.integers(1, 8))
    num_slots = len(load) + draw(st.integers(0, len(load) * (ep_size - 1)))
    assume(num_slots >= ep_size)
    return load, num_slots, ep_size


@pytest.mark.parametrize(
    ("load", "slots"), list(zip(PUBLISHED_LOADS, PUBLISHED_SLOTS, strict=True))
)
def test_example_of_the_published_method_comes_out_as_published(
    load: tuple[float, ...], slots: list[int]
) -> None:
    held = balanced(load, 16, 8, num_expert_groups=4, num_nodes=2)
    assert [expert for group in held for expert in group] == slots


@given(tiers())
def test_every_expert_is_there_and_no_group_has_it_twice(
    tier: tuple[list[float], int, int],
) -> None:
    load, num_slots, ep_size = tier
    check(balanced(load, num_slots, ep_size), len(load), num_slots, ep_size)


@given(st.data())
def test_nodes_keep_whole_groups_of_experts_to_themselves(data: st.DataObject) -> None:
    num_nodes, per_node = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    num_groups, size = num_nodes * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    num_experts, ep_size = num_groups * size, num_nodes * per_node
    load = data.draw(st.lists(st.floats(0, 100), min_size=num_experts, max_size=num_experts))
    most = num_experts * (per_node - 1)
    num_slots = num_experts + num_nodes * data.draw(st.integers(0, most // num_nodes))
    assume(num_slots >= ep_size)
    held = balanced(load, num_slots, ep_size, num_expert_groups=num_groups, num_nodes=num_nodes)
    check(held, num_experts, num_slots, ep_size)
    slots = [
        sum(even_parts(num_slots, ep_size)[n * per_node :][:per_node]) for n in range(num_nodes)
    ]
    if len(set(slots)) == 1:
        nodes = [
            {expert // size for group in held[n * per_node :][:per_node] for expert in group}
            for n in range(num_nodes)
        ]
        assert sum(map(len, nodes)) == num_groups


@given(tiers())
def test_copies_follow_the_load(tier: tuple[list[float], int, int]) -> None:
    load, num_slots, ep_size = tier
    flat = [expert for group in balanced(load, num_slots, ep_size) for expert in group]
    copies = [flat.count(expert) for expert in range(len(load))]
    for more, less in permutations(range(len(load)), 2):
        if copies[more] > 1 and copies[less] < ep_size:
            # the last copy went where most was to be had
            assert load[more] / (copies[more] - 1) >= load[less] / copies[less]


@pytest.mark.parametrize("exponent", [1.0, 1.2])
@pytest.mark.parametrize(
    ("num_experts", "ep_size"), [(64, 8), (64, 16), (128, 16), (128, 32), (256, 16), (256, 32)]
)
def test_zipf_load_is_levelled_by_a_quarter_of_redundant_slots(
    num_experts: int, ep_size: int, exponent: float
) -> None:
    for seed in range(5):
        load = zipf(num_experts, seed, exponent)
        assert imbalance(load, trivial(num_experts, ep_size)) > 2
        assert imbalance(load, balanced(load, num_experts * 5 // 4, ep_size)) < 1.15


@pytest.mark.parametrize("redundant", [0, 8, 32])
@pytest.mark.parametrize("ep_size", [4, 8, 12])
def test_no_load_comes_out_worse_than_contiguous_experts(ep_size: int, redundant: int) -> None:
    for seed in range(20):
        source = random.Random(seed)
        load = [source.expovariate(1.0) ** 2 for _ in range(96)]
        held = balanced(load, 96 + redundant, ep_size)
        assert imbalance(load, held) <= imbalance(load, trivial(96, ep_size))


@settings(max_examples=50)
@given(st.data())
def test_as_few_experts_move_as_any_naming_of_groups_allows(data: st.DataObject) -> None:
    ep_size = data.draw(st.integers(1, 4))
    load = data.draw(st.lists(st.integers(1, 99), min_size=ep_size, max_size=10))
    num_slots = len(load) + data.draw(st.integers(0, len(load) * (ep_size - 1)))
    new = balanced(load, num_slots, ep_size)
    old = balanced(data.draw(st.permutations(load)), num_slots, ep_size)
    named = least_moved(old, new)
    check(named, len(load), num_slots, ep_size)
    assert sorted(map(sorted, named)) == sorted(map(sorted, new))
    sizes = [len(group) for group in new]
    fewest = min(
        num_moved(old, order)
        for order in permutations(new)
        if [len(group) for group in order] == sizes
    )
    assert num_moved(old, named) == fewest


def test_what_stays_keeps_its_slot() -> None:
    old = [[3, 1, 4], [0, 2, 5]]
    assert least_moved(old, [[0, 1, 2], [3, 4, 5]]) == [[3, 5, 4], [0, 2, 1]]
    assert least_moved([[0, 1], [2, 3]], [[2, 3], [0, 1]]) == [[0, 1], [2, 3]]


def test_groups_are_not_exchanged_between_nodes_one_by_one() -> None:
    old = [[0], [1], [2], [3]]
    new = [[3], [0], [2], [1]]
    assert least_moved(old, new, num_nodes=1) == [[0], [1], [2], [3]]
    assert least_moved(old, new, num_nodes=2) == [[0], [3], [2], [1]]


@given(tiers(), st.integers(1, 8), st.randoms(use_true_random=False))
def test_resizing_keeps_all_that_can_stay(
    tier: tuple[list[float], int, int], ep_size: int, source: random.Random
) -> None:
    load, num_slots, before = tier
    assume(ep_size <= num_slots <= len(load) * ep_size)
    held = balanced([source.random() for _ in load], num_slots, before)
    after = resized(held, load, ep_size)
    check(after, len(load), num_slots, ep_size)
    if ep_size == before:
        assert after == [list(group) for group in held]


def test_resizing_moves_no_more_than_the_new_groups_hold() -> None:
    old = trivial(16, 2)
    more = resized(old, [1.0] * 16, 4)
    assert more[:2] == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert num_moved(old, more) == 8
    fewer = resized(more, [1.0] * 16, 3)
    assert num_moved(more, fewer) == 4


def test_no_load_is_level() -> None:
    assert imbalance([0.0] * 4, trivial(4, 2)) == 1
    check(balanced([0.0] * 4, 6, 2), 4, 6, 2)
