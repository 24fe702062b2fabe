"""The scheduler and its blocks under random traffic, against a plain model.

Prompts begin alike and differ later, so blocks are shared; pools are small, so sequences are
preempted and cached blocks evicted; any sequence may be removed at any time.
"""

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from attn_service.kv_blocks import BlockPool
from attn_service.scheduler import Scheduled, Scheduler, SchedulerConfig
from attn_service.sequence import Sampling, Sequence, SequenceRequest
from moe_core.errors import RequestError

BASES = ((1,) * 60, (1,) * 9 + (2,) * 51, (3, 4) * 30)
MAX_SEQS = 4
BUDGET = 11
CONTEXT = 70


@dataclass
class Model:
    """What must hold of a scheduler, told by its sequences alone."""

    block_size: int
    num_blocks: int
    growth_blocks: int
    alive: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks, self.block_size)
        config = SchedulerConfig(MAX_SEQS, BUDGET, CONTEXT, self.growth_blocks)
        self.scheduler = Scheduler(config, self.pool)

    def add(self, base: int, length: int, outputs: int, priority: int) -> None:
        prompt = (*BASES[base][:length], length)
        added = Sequence(
            SequenceRequest("s", prompt, Sampling(max_tokens=outputs), priority=priority)
        )
        fits = (
            len(prompt) + outputs <= CONTEXT
            and len(prompt) + outputs - 1 <= self.num_blocks * self.block_size
        )
        try:
            self.scheduler.add(added)
        except RequestError:
            assert not fits
        else:
            assert fits
            self.alive.append(added)

    def remove(self, which: int, reusable: bool) -> None:
        if self.alive:
            self.scheduler.remove(self.alive.pop(which % len(self.alive)), reusable=reusable)

    def step(self) -> None:
        before = [each for each in self.alive if each.is_running]
        scheduled = self.scheduler.schedule()
        self.check_step(before, scheduled)
        self.check_blocks()
        for item in scheduled:
            caught_up = item.catches_up
            self.scheduler.computed(item)
            if caught_up and item.sequence.append(item.sequence.num_tokens % 3):
                self.scheduler.remove(item.sequence)
                self.alive.remove(item.sequence)

    def check_step(self, before: list[Sequence], scheduled: tuple[Scheduled, ...]) -> None:
        counts = {item.sequence: item.num_new_tokens for item in scheduled}
        running = [each for each in self.alive if each.is_running]
        assert len(counts) == len(scheduled)
        assert all(each.is_running for each in counts)
        assert sum(counts.values()) <= BUDGET
        assert len(running) <= MAX_SEQS
        if self.alive:
            assert min(running, key=lambda each: each.order) in counts
        # Who was one token behind gets it, unless blocks ran out.
        for each in before:
            if each.is_running and each.num_pending_tokens == 1 and each not in counts:
                assert self.pool.num_free == 0
                assert each is max(running, key=lambda r: r.order)
        preempted = [each for each in before if not each.is_running]
        for each in preempted:
            assert (each.num_computed_tokens, each.block_table) == (0, [])
            assert all(each.order > other.order for other in running)
        # Nobody is let past one that waits, except past one whose prompt is being computed.
        admitted = [each for each in running if each not in before]
        assert counts.keys() >= set(admitted)
        for each in self.alive:
            if not each.is_running and any(each.order < other.order for other in admitted):
                assert any(self.will_share(other, each) for other in running)
        assert not (preempted and admitted)

    def will_share(self, other: Sequence, waiting: Sequence) -> bool:
        """Whether `other`, served first, has yet to compute a block that `waiting` needs."""
        start = other.num_computed_tokens // self.block_size * self.block_size
        end = start + self.block_size
        mine, theirs = waiting.token_ids[:end], other.token_ids[:end]
        return other.order < waiting.order and len(mine) == end and mine == theirs

    def check_blocks(self) -> None:
        users: Counter[int] = Counter()
        holds: dict[int, tuple[int, ...]] = {}  # a shared block's tokens and all before them
        for each in self.alive:
            assert bool(each.block_table) == each.is_running
            assert len(set(each.block_table)) == len(each.block_table)
            assert each.num_computed_tokens <= len(each.block_table) * self.block_size
            users.update(each.block_table)
        for each in self.alive:
            for index, block in enumerate(each.block_table):
                if users[block] == 1:
                    continue
                end = (index + 1) * self.block_size
                assert each.num_computed_tokens >= end  # so it is full, and nobody writes to it
                prefix = tuple(each.token_ids[:end])
                assert holds.setdefault(block, prefix) == prefix
        assert set(users) <= set(range(self.num_blocks))
        assert self.pool.num_free == self.num_blocks - len(users)

    def finish(self) -> None:
        """Every step computes something, so this many are enough if nothing runs in circles."""
        bound = 20 * sum(each.request.max_computed_tokens for each in self.alive)
        for _ in range(bound):
            if not self.alive:
                break
            self.step()
        assert not self.alive
        assert not self.scheduler.has_work
        assert self.pool.num_free == self.num_blocks


ACTIONS = st.one_of(
    st.tuples(
        st.just("add"),
        st.integers(0, len(BASES) - 1),
        st.integers(0, 40),
        st.integers(1, 25),
        st.sampled_from([0, 0, 0, 1, -1]),
    ),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("remove"), st.integers(0, 10**6), st.booleans()),
)


@given(
    traffic=st.lists(ACTIONS, max_size=60),
    num_blocks=st.integers(2, 24),
    block_size=st.sampled_from([1, 4, 16]),
    growth_blocks=st.sampled_from([0, 0, 2]),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_no_block_is_leaked_wrongly_shared_or_freed_twice_and_every_sequence_ends(
    traffic: list[tuple], num_blocks: int, block_size: int, growth_blocks: int
) -> None:
    model = Model(block_size, num_blocks, growth_blocks)
    for action, *numbers in traffic:
        if action == "add":
            model.add(*numbers)
        elif action == "remove":
            model.remove(*numbers)
        else:
            for _ in range(numbers[0]):
                model.step()
        model.check_blocks()
    model.finish()


def test_the_traffic_preempts_shares_and_evicts() -> None:
    """That the property above is not about an empty case: one dense example of it."""
    model = Model(block_size=4, num_blocks=20, growth_blocks=0)
    evictions_possible = False
    for number in range(60):
        model.add(number % 3, 5 + 7 * number % 40, 1 + 5 * number % 24, number % 2)
        for _ in range(4):
            model.step()
        evictions_possible |= model.pool.num_cached > 0 and model.pool.num_free == (
            model.pool.num_cached
        )
    model.finish()
    cache = model.scheduler.cache
    assert model.scheduler.num_preemptions > 10
    assert 0.2 < cache.num_hit_tokens / cache.num_query_tokens < 1
    assert evictions_possible
