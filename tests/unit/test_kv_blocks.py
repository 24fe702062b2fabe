import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_service.kv_blocks import BlockPool
from attn_service.scheduler import Scheduler, SchedulerConfig
from attn_service.sequence import Sampling, Sequence, SequenceRequest
from moe_core.errors import ConfigError, RequestError


def test_blocks_are_handed_out_once_and_come_back() -> None:
    pool = BlockPool(num_blocks=4, block_size=16)
    first = pool.allocate(3)
    assert len(set(first)) == 3
    assert pool.num_free == 1
    pool.free(first)
    assert pool.num_free == 4
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]


def test_allocating_more_than_is_free_takes_nothing() -> None:
    pool = BlockPool(num_blocks=2, block_size=16)
    with pytest.raises(ValueError, match="3 KV blocks wanted, 2 free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_freeing_a_free_block_is_refused() -> None:
    pool = BlockPool(num_blocks=2, block_size=16)
    (block,) = pool.allocate(1)
    pool.free((block,))
    with pytest.raises(ValueError, match="was not taken"):
        pool.free((block,))


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_a_begun_block_counts_as_a_whole_one(tokens: int, blocks: int) -> None:
    assert BlockPool(num_blocks=4, block_size=16).blocks_for(tokens) == blocks


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0)])
def test_an_empty_pool_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        BlockPool(num_blocks, block_size)


TRAFFIC = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 40), st.integers(1, 30)),
        st.tuples(st.just("step"), st.integers(0, 10**6), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 10**6), st.just(0)),
    ),
    max_size=60,
)


@given(traffic=TRAFFIC, num_blocks=st.integers(2, 12), block_size=st.sampled_from([1, 4, 16]))
@settings(max_examples=150, deadline=None)
def test_no_block_is_leaked_shared_or_freed_twice_under_random_traffic(
    traffic: list[tuple[str, int, int]], num_blocks: int, block_size: int
) -> None:
    """Against a plain model: the blocks of running sequences and the free ones partition all."""
    pool = BlockPool(num_blocks, block_size)
    scheduler = Scheduler(SchedulerConfig(4, 16, 64), pool)
    alive: list[Sequence] = []
    for action, a, b in traffic:
        if action == "add":
            sequence = Sequence(SequenceRequest("s", (1,) * a, Sampling(max_tokens=b)))
            try:
                scheduler.add(sequence)
            except RequestError:
                continue
            alive.append(sequence)
        elif action == "cancel" and alive:
            scheduler.remove(alive.pop(a % len(alive)))
        elif action == "step":
            for item in scheduler.schedule():
                caught_up = item.catches_up
                scheduler.computed(item)
                assert item.sequence.num_computed_tokens <= (
                    len(item.sequence.block_table) * block_size
                )
                if caught_up and item.sequence.append(7):
                    scheduler.remove(item.sequence)
                    alive.remove(item.sequence)
        held = [block for sequence in alive for block in sequence.block_table]
        assert len(held) == len(set(held))
        assert set(held) <= set(range(num_blocks))
        assert pool.num_free == num_blocks - len(held)
    for sequence in alive:
        scheduler.remove(sequence)
    assert pool.num_free == num_blocks
    assert not scheduler.has_work
