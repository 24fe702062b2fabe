"""The block pool alone, step by step and against a plain model."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from attn_service.kv_blocks import BlockPool
from moe_core.errors import ConfigError

KEYS = [bytes([i]) for i in range(6)]


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


def test_a_shared_block_is_free_after_its_last_user() -> None:
    pool = BlockPool(num_blocks=1, block_size=16)
    (block,) = pool.allocate(1)
    pool.share([block])
    pool.free([block])
    assert pool.num_free == 0
    pool.free([block])
    assert pool.num_free == 1


def test_a_registered_block_is_found_until_it_is_handed_out_again() -> None:
    pool = BlockPool(num_blocks=2, block_size=16)
    (block,) = pool.allocate(1)
    pool.register(block, b"key")
    pool.free([block])
    assert pool.find(b"key") == block
    pool.allocate(1)  # the blank one first
    assert pool.find(b"key") == block
    assert pool.allocate(1) == (block,)
    assert pool.find(b"key") is None


def test_the_longest_unused_is_evicted_first() -> None:
    pool = BlockPool(num_blocks=3, block_size=16)
    blocks = pool.allocate(3)
    for block, key in zip(blocks, KEYS, strict=False):
        pool.register(block, key)
        pool.free([block])
    pool.share([blocks[0]])
    pool.free([blocks[0]])
    assert pool.allocate(2) == (blocks[1], blocks[2])
    assert pool.find(KEYS[0]) == blocks[0]


def test_the_first_of_two_equal_blocks_stays_the_one_that_is_found() -> None:
    pool = BlockPool(num_blocks=2, block_size=16)
    first, second = pool.allocate(2)
    pool.register(first, b"key")
    pool.register(second, b"key")
    assert pool.find(b"key") == first
    pool.free([first, second])
    assert pool.num_cached == 1


def test_a_forgotten_block_is_not_found() -> None:
    pool = BlockPool(num_blocks=1, block_size=16)
    (block,) = pool.allocate(1)
    pool.register(block, b"key")
    pool.forget([block])
    assert pool.find(b"key") is None


@pytest.mark.parametrize("use", ["share", "register", "forget"])
def test_a_blank_block_cannot_be_used(use: str) -> None:
    pool = BlockPool(num_blocks=1, block_size=16)
    with pytest.raises(ValueError, match="KV block 0 is"):
        pool.register(0, b"key") if use == "register" else getattr(pool, use)([0])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_a_begun_block_counts_as_a_whole_one(tokens: int, blocks: int) -> None:
    assert BlockPool(num_blocks=4, block_size=16).blocks_for(tokens) == blocks


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0)])
def test_an_empty_pool_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        BlockPool(num_blocks, block_size)


class PoolAgainstModel(RuleBasedStateMachine):
    """The model: how many users each block has, which key each block has, and since when it has
    been unused."""

    SIZE = 5

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.SIZE, 4)
        self.users = [0] * self.SIZE
        self.keys: dict[int, bytes] = {}
        self.unused: list[int] = []  # with a key, the longest unused first

    def taken(self) -> list[int]:
        return [block for block, users in enumerate(self.users) if users]

    @rule(count=st.integers(0, 3))
    def allocate(self, count: int) -> None:
        free = self.users.count(0)
        if count > free:
            with pytest.raises(ValueError, match="wanted"):
                self.pool.allocate(count)
            return
        num_blank = free - len(self.unused)
        evicted = [self.unused.pop(0) for _ in range(count - num_blank)]
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not any(self.users[block] for block in blocks)
        assert not set(blocks).intersection(self.unused)
        assert set(evicted) <= set(blocks)
        for block in blocks:
            self.keys.pop(block, None)
            self.users[block] = 1

    @precondition(lambda self: any(self.users))
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.taken()))
        self.pool.free([block])
        self.users[block] -= 1
        if not self.users[block] and block in self.keys:
            self.unused.append(block)

    @rule(key=st.sampled_from(KEYS))
    def find_and_share(self, key: bytes) -> None:
        block = self.pool.find(key)
        assert block == next((b for b, k in self.keys.items() if k == key), None)
        if block is None:
            return
        assert self.pool.num_cached_of([block]) == (block in self.unused)
        self.pool.share([block])
        self.users[block] += 1
        if block in self.unused:
            self.unused.remove(block)

    @precondition(lambda self: any(self.users))
    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def register(self, data: st.DataObject, key: bytes) -> None:
        block = data.draw(st.sampled_from(self.taken()))
        if self.keys.get(block, key) != key:
            with pytest.raises(ValueError, match="another key"):
                self.pool.register(block, key)
            return
        self.pool.register(block, key)
        if key not in self.keys.values():
            self.keys[block] = key

    @precondition(lambda self: any(self.users))
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.taken()))
        self.pool.forget([block])
        self.keys.pop(block, None)

    @invariant()
    def counts_agree(self) -> None:
        assert self.pool.num_free == self.users.count(0)
        assert self.pool.num_cached == len(self.unused)


TestPoolAgainstModel = PoolAgainstModel.TestCase
TestPoolAgainstModel.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True
)
