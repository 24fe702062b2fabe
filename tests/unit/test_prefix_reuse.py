"""Prefix reuse: who hits what, who waits for whom, and what may not be found."""

import pytest

from attn_service.kv_blocks import BlockPool
from attn_service.prefix_cache import PrefixCache
from attn_service.scheduler import Scheduler, SchedulerConfig
from attn_service.sequence import Sampling, Sequence, SequenceRequest

BLOCK = 4
PROMPT = tuple(range(10, 24))  # 3 full blocks and 2 tokens


class Traffic:
    def __init__(self, *, seqs: int = 4, budget: int = 32, blocks: int = 32) -> None:
        self.pool = BlockPool(blocks, BLOCK)
        self.scheduler = Scheduler(SchedulerConfig(seqs, budget, 128, growth_blocks=0), self.pool)

    def add(
        self, name: str, prompt: tuple[int, ...], outputs: int = 4, priority: int = 0
    ) -> Sequence:
        added = Sequence(
            SequenceRequest(name, prompt, Sampling(max_tokens=outputs), priority=priority)
        )
        self.scheduler.add(added)
        return added

    def step(self, token: int = 2) -> dict[str, int]:
        scheduled = self.scheduler.schedule()
        for item in scheduled:
            caught_up = item.catches_up
            self.scheduler.computed(item)
            if caught_up and item.sequence.append(token):
                self.scheduler.remove(item.sequence)
        return {each.sequence.request.sequence_id: each.num_new_tokens for each in scheduled}

    def finish(self) -> None:
        while self.scheduler.has_work:
            self.step()


def test_a_prompt_seen_before_is_computed_from_its_last_full_block_on() -> None:
    traffic = Traffic()
    first = traffic.add("a", PROMPT)
    traffic.finish()
    again = traffic.add("b", PROMPT)
    assert traffic.step() == {"b": 2}
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 12)
    cache = traffic.scheduler.cache
    assert (cache.num_query_tokens, cache.num_hit_tokens) == (28, 12)


def test_the_last_token_is_computed_even_where_its_block_is_cached() -> None:
    traffic = Traffic()
    traffic.add("a", PROMPT[:12])
    traffic.finish()
    again = traffic.add("b", PROMPT[:12])
    assert traffic.step() == {"b": 4}
    assert again.num_cached_tokens == 8


def test_the_next_turn_of_a_conversation_hits_the_outputs_of_the_last() -> None:
    traffic = Traffic()
    first = traffic.add("a", PROMPT, outputs=7)
    traffic.finish()
    turn = traffic.add("b", (*first.token_ids, 30, 31))
    traffic.step()
    assert first.num_tokens == 21  # of which the last was never computed
    assert turn.num_cached_tokens == 20


def test_a_block_with_the_same_tokens_behind_another_prefix_is_no_hit() -> None:
    traffic = Traffic()
    traffic.add("a", (1, 1, 1, 1, 5, 6, 7, 8, 9))
    traffic.finish()
    other = traffic.add("b", (2, 2, 2, 2, 5, 6, 7, 8, 9))
    traffic.step()
    assert other.num_cached_tokens == 0


def test_a_block_is_not_found_before_its_step_is_over() -> None:
    traffic = Traffic()
    first = traffic.add("a", PROMPT)
    (scheduled,) = traffic.scheduler.schedule()
    cache = PrefixCache(traffic.pool)
    assert cache.find(first) == []
    traffic.scheduler.computed(scheduled)
    assert cache.find(first) == first.block_table[:3]


def test_what_an_unusable_sequence_has_computed_is_not_found() -> None:
    traffic = Traffic()
    first = traffic.add("a", PROMPT)
    traffic.step()
    traffic.scheduler.remove(first, reusable=False)
    again = traffic.add("b", PROMPT)
    traffic.step()
    assert again.num_cached_tokens == 0


def test_siblings_compute_their_prompt_once() -> None:
    traffic = Traffic()
    siblings = [traffic.add(name, PROMPT) for name in "abc"]
    assert traffic.step() == {"a": 14}
    assert traffic.step() == {"a": 1, "b": 2, "c": 2}
    tables = [each.block_table for each in siblings]
    assert tables[0][:3] == tables[1][:3] == tables[2][:3]
    assert len({table[3] for table in tables}) == 3
    traffic.finish()
    assert traffic.pool.num_free == 32


def test_nobody_waits_for_a_block_that_holds_its_own_last_token() -> None:
    traffic = Traffic(budget=8)
    for name in "ab":
        traffic.add(name, PROMPT[:12])
    assert traffic.step() == {"a": 8}
    assert traffic.step() == {"a": 4, "b": 4}


def test_siblings_wait_for_a_prompt_in_chunks_and_others_do_not_wait_with_them() -> None:
    traffic = Traffic(budget=8)
    traffic.add("a", PROMPT)
    traffic.add("b", PROMPT)
    assert traffic.step() == {"a": 8}
    traffic.add("other", (50,) * 9)
    assert traffic.step() == {"a": 6, "other": 2}
    assert traffic.step() == {"a": 1, "b": 2, "other": 5}


def test_one_with_a_short_common_prefix_waits_no_longer_than_for_that() -> None:
    traffic = Traffic(budget=8)
    traffic.add("a", tuple(range(100, 140)))
    traffic.step()
    traffic.add("b", (*range(100, 112), 3, 3))
    assert traffic.step() == {"a": 8}
    assert traffic.scheduler.num_waiting == 1
    assert traffic.step() == {"a": 8}  # no longer held, but the budget goes to a first
    urgent = traffic.add("c", (*range(100, 112), 4, 4), priority=-1)
    assert traffic.step() == {"c": 2, "a": 6}
    assert urgent.num_cached_tokens == 12


def test_a_held_sequence_keeps_its_seat() -> None:
    traffic = Traffic(seqs=2, budget=8)
    traffic.add("a", PROMPT)
    traffic.add("b", PROMPT)
    traffic.add("other", (50,) * 4)
    assert traffic.step() == {"a": 8}
    assert traffic.step() == {"a": 6}
    assert traffic.step() == {"a": 1, "b": 2}


def test_nobody_waits_for_a_prompt_that_is_served_later() -> None:
    traffic = Traffic(budget=8)
    traffic.add("low", PROMPT, priority=1)
    traffic.step()
    traffic.add("urgent", PROMPT)
    assert traffic.step() == {"urgent": 6, "low": 2}


@pytest.mark.parametrize("ends", [True, False])
def test_a_held_sequence_goes_on_when_the_other_is_removed(ends: bool) -> None:
    traffic = Traffic(budget=8)
    first, second = traffic.add("a", PROMPT), traffic.add("b", PROMPT)
    assert traffic.step() == {"a": 8}
    traffic.scheduler.remove(first if ends else second)
    assert traffic.step() == ({"b": 6} if ends else {"a": 6})
    traffic.finish()
    assert second.num_cached_tokens == (8 if ends else None)


def test_nobody_waits_for_what_has_been_computed_but_is_not_to_be_found() -> None:
    traffic = Traffic()
    traffic.add("a", PROMPT)
    traffic.step()
    spoilt = traffic.add("b", PROMPT)
    traffic.step()
    traffic.scheduler.remove(spoilt, reusable=False)  # the blocks that it shares with a
    traffic.add("c", PROMPT)
    assert traffic.step() == {"a": 1, "c": 14}


def test_blocks_that_are_found_do_not_count_as_free_for_the_rest_of_the_prompt() -> None:
    traffic = Traffic(blocks=4)
    traffic.add("long", PROMPT[:13], outputs=1)
    traffic.finish()
    short = traffic.add("short", (99,), outputs=3)
    assert traffic.step() == {"short": 1}  # takes the one block that holds nothing
    traffic.add("long again", PROMPT[:13], outputs=1)
    assert traffic.step() == {"short": 1}
    assert traffic.scheduler.num_running == 1
    traffic.scheduler.remove(short)
    assert traffic.step() == {"long again": 1}


def test_a_preempted_sequence_finds_its_own_blocks_that_nobody_took() -> None:
    traffic = Traffic(blocks=6)
    first = traffic.add("a", (1,) * 8, outputs=16)
    last = traffic.add("b", (2,) * 9, outputs=12)
    for _ in range(20):
        traffic.step()
        if traffic.scheduler.num_preemptions:
            break
    assert last.num_computed_tokens == 0
    traffic.scheduler.remove(first)
    num_tokens = last.num_tokens
    assert traffic.step() == {"b": num_tokens - 8}
    assert last.num_cached_tokens == 0  # what it reports is its prompt's hits
    assert traffic.scheduler.cache.num_query_tokens == 17


def test_cached_blocks_are_evicted_the_longest_unused_first_and_tails_before_heads() -> None:
    traffic = Traffic(blocks=8)
    for start in (100, 200):
        traffic.add(str(start), tuple(range(start, start + 12)), outputs=1)
        traffic.finish()
    assert traffic.pool.num_free == 8
    big = traffic.add("big", tuple(range(300, 315)), outputs=1)  # 2 blank, 2 evicted
    traffic.finish()
    assert big.num_cached_tokens == 0
    old = traffic.add("old", tuple(range(100, 112)), outputs=1)
    traffic.step()
    assert old.num_cached_tokens == 4
    new = traffic.add("new", tuple(range(200, 212)), outputs=1)
    traffic.step()
    assert new.num_cached_tokens == 8
