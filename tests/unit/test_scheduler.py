import itertools

import pytest

from attn_service.kv_blocks import BlockPool
from attn_service.scheduler import Scheduler, SchedulerConfig
from attn_service.sequence import Sampling, Sequence, SequenceRequest
from moe_core.errors import ConfigError, RequestError

_starts = itertools.count(1000)


def sequence(
    name: str,
    prompt: int | tuple[int, ...],
    outputs: int = 4,
    *,
    priority: int = 0,
) -> Sequence:
    """A prompt given by its length shares nothing with any other."""
    ids = prompt if isinstance(prompt, tuple) else (next(_starts),) * prompt
    return Sequence(SequenceRequest(name, ids, Sampling(max_tokens=outputs), priority=priority))


def scheduler(
    *,
    seqs: int = 4,
    budget: int = 16,
    context: int = 64,
    blocks: int = 32,
    block_size: int = 4,
    growth_blocks: int = 0,
) -> Scheduler:
    config = SchedulerConfig(seqs, budget, context, growth_blocks)
    return Scheduler(config, BlockPool(blocks, block_size))


def step(under_test: Scheduler) -> list[tuple[str, int]]:
    """Schedule, compute and append a token where a sequence has caught up."""
    scheduled = under_test.schedule()
    for item in scheduled:
        caught_up = item.catches_up
        under_test.computed(item)
        if caught_up and item.sequence.append(2):
            under_test.remove(item.sequence)
    return [(item.sequence.request.sequence_id, item.num_new_tokens) for item in scheduled]


def test_a_step_never_exceeds_its_token_budget() -> None:
    under_test = scheduler(budget=16)
    for name in "abc":
        under_test.add(sequence(name, 10))
    assert step(under_test) == [("a", 10), ("b", 6)]
    assert step(under_test) == [("a", 1), ("b", 4), ("c", 10)]
    assert step(under_test) == [("a", 1), ("b", 1), ("c", 1)]


def test_a_prompt_longer_than_the_budget_is_computed_over_several_steps() -> None:
    under_test = scheduler(budget=16)
    under_test.add(sequence("long", 40, outputs=2))
    assert [step(under_test) for _ in range(4)] == [
        [("long", 16)],
        [("long", 16)],
        [("long", 8)],
        [("long", 1)],
    ]
    assert not under_test.has_work


def test_a_running_sequence_keeps_its_next_token_beside_a_long_prompt() -> None:
    under_test = scheduler(budget=16)
    under_test.add(sequence("short", 2, outputs=8))
    step(under_test)
    under_test.add(sequence("long", 40))
    assert step(under_test) == [("short", 1), ("long", 15)]
    assert step(under_test) == [("short", 1), ("long", 15)]


def test_next_tokens_come_before_a_prompt_that_is_served_first() -> None:
    under_test = scheduler(seqs=3, budget=3)
    for name in "ab":
        under_test.add(sequence(name, 1, outputs=8))
    step(under_test)
    under_test.add(sequence("urgent", 40, priority=-1))
    assert step(under_test) == [("a", 1), ("b", 1), ("urgent", 1)]
    assert step(under_test) == [("a", 1), ("b", 1), ("urgent", 1)]


def test_a_late_arrival_joins_the_running_batch_and_a_finished_one_leaves() -> None:
    under_test = scheduler()
    under_test.add(sequence("first", 3, outputs=2))
    assert step(under_test) == [("first", 3)]
    under_test.add(sequence("late", 5))
    assert step(under_test) == [("first", 1), ("late", 5)]
    assert step(under_test) == [("late", 1)]


def test_admission_is_first_come_even_where_a_later_one_would_fit() -> None:
    under_test = scheduler(blocks=4, block_size=4)
    under_test.add(sequence("runs", 8, outputs=1))
    under_test.add(sequence("waits", 12, outputs=1))
    under_test.add(sequence("small", 1, outputs=1))
    assert step(under_test) == [("runs", 8)]
    assert step(under_test) == [("waits", 12), ("small", 1)]


def test_no_more_than_max_num_seqs_run() -> None:
    under_test = scheduler(seqs=2)
    for name in "abc":
        under_test.add(sequence(name, 1, outputs=3))
    assert [name for name, _ in step(under_test)] == ["a", "b"]
    assert (under_test.num_running, under_test.num_waiting) == (2, 1)


def test_a_lower_priority_value_is_served_first_and_equal_ones_by_arrival() -> None:
    under_test = scheduler(seqs=1)
    for name, priority in [("a", 5), ("b", 0), ("c", -3), ("d", 0)]:
        under_test.add(sequence(name, 2, outputs=1, priority=priority))
    assert [step(under_test) for _ in range(4)] == [[("c", 2)], [("b", 2)], [("d", 2)], [("a", 2)]]


def test_the_rest_of_a_prompt_waits_for_one_with_a_lower_priority_value() -> None:
    under_test = scheduler(budget=16)
    under_test.add(sequence("long", 40, outputs=1))
    assert step(under_test) == [("long", 16)]
    under_test.add(sequence("urgent", 20, outputs=1, priority=-1))
    assert step(under_test) == [("urgent", 16)]
    assert step(under_test) == [("urgent", 4), ("long", 12)]
    assert step(under_test) == [("long", 12)]


def test_blocks_are_taken_as_a_sequence_grows() -> None:
    under_test = scheduler(budget=8, block_size=4)
    growing = sequence("growing", 10, outputs=8)
    under_test.add(growing)
    sizes = []
    while under_test.has_work:
        under_test.schedule()
        sizes.append(len(growing.block_table))
        step(under_test)
    assert sizes == [2, 3, 3, 3, 4, 4, 4, 4, 5]


def test_the_last_to_come_is_preempted_when_blocks_run_out_and_waits_in_its_place() -> None:
    under_test = scheduler(blocks=4, block_size=4)
    first, second, third = (sequence(name, 4, outputs=8) for name in "abc")
    for each in (first, second, third):
        under_test.add(each)
    assert step(under_test) == [("a", 4), ("b", 4), ("c", 4)]  # 3 of 4 blocks
    assert step(under_test) == [("a", 1), ("b", 1)]  # a takes the fourth, b takes c's
    assert under_test.num_preemptions == 1
    assert (third.num_computed_tokens, third.block_table, third.num_tokens) == (0, [], 5)
    under_test.add(sequence("d", 1))
    assert [each.request.sequence_id for each in under_test.sequences()] == ["a", "b", "c", "d"]


def test_the_highest_priority_value_is_preempted_first() -> None:
    under_test = scheduler(blocks=3, block_size=4)
    for name, priority in [("low", 9), ("a", 0), ("b", 0)]:
        under_test.add(sequence(name, 4, outputs=8, priority=priority))
    assert step(under_test) == [("a", 4), ("b", 4), ("low", 4)]
    assert step(under_test) == [("a", 1)]  # with low's block; b is the last now, and keeps its own
    assert [each.request.sequence_id for each in under_test.sequences()] == ["a", "b", "low"]
    assert under_test.num_preemptions == 1


def test_a_prompt_that_is_served_first_preempts_what_the_step_had_scheduled() -> None:
    under_test = scheduler(seqs=2, budget=4, blocks=5, block_size=4)
    low = sequence("low", 2, outputs=12, priority=1)
    under_test.add(low)
    step(under_test)
    under_test.add(sequence("urgent", 16, outputs=1))
    for _ in range(4):
        assert step(under_test) == [("low", 1), ("urgent", 3)]
    assert step(under_test) == [("urgent", 4)]  # low's token of the budget is given back
    assert (under_test.num_preemptions, low.num_computed_tokens) == (1, 0)


def test_a_chunk_shrinks_to_the_free_blocks_before_anything_is_preempted() -> None:
    under_test = scheduler(seqs=2, budget=8, blocks=6, block_size=4)
    under_test.add(sequence("low", 2, outputs=12, priority=1))
    step(under_test)
    under_test.add(sequence("urgent", 20, outputs=1))
    assert step(under_test) == [("low", 1), ("urgent", 7)]
    assert step(under_test) == [("low", 1), ("urgent", 7)]
    assert step(under_test) == [("low", 1), ("urgent", 2)]  # low took the last block
    assert under_test.num_preemptions == 0
    assert step(under_test) == [("urgent", 4)]
    assert under_test.num_preemptions == 1


def test_admission_leaves_the_running_ones_room_to_grow() -> None:
    under_test = scheduler(blocks=6, block_size=4, growth_blocks=2)
    for name in "abc":
        under_test.add(sequence(name, 4))
    assert step(under_test) == [("a", 4), ("b", 4)]  # 4 are left to them
    assert under_test.num_waiting == 1


def test_nobody_is_admitted_to_a_step_that_preempted() -> None:
    under_test = scheduler(blocks=3, block_size=4)
    for name in "ab":
        under_test.add(sequence(name, 4, outputs=9))
    step(under_test)
    step(under_test)  # a has 2 blocks, b waits for one
    under_test.add(sequence("small", 1, outputs=1))
    for _ in range(3):
        step(under_test)
    assert step(under_test) == [("a", 1)]  # preempts b, whose block alone would hold small
    assert (under_test.num_preemptions, under_test.num_waiting) == (1, 2)


def test_a_sequence_that_fits_alone_ends_whatever_else_runs() -> None:
    under_test = scheduler(seqs=4, blocks=5, block_size=4)
    sequences = [sequence(name, 5, outputs=16) for name in "abcd"]  # each fills the pool
    for each in sequences:
        under_test.add(each)
    for _ in range(4 * 21):
        if not under_test.has_work:
            break
        step(under_test)
    assert not under_test.has_work
    assert [each.num_output_tokens for each in sequences] == [16] * 4
    assert under_test.num_preemptions > 0


def test_a_request_that_can_never_fit_the_cache_is_refused_with_the_numbers() -> None:
    under_test = scheduler(blocks=4, block_size=4, context=1000)
    under_test.add(sequence("just fits", 10, outputs=7))
    with pytest.raises(RequestError, match=r"prompt of 10 .* max_tokens=8 need 17 .* holds 16"):
        under_test.add(sequence("too long", 10, outputs=8))


def test_a_request_that_exceeds_the_context_is_refused_with_the_numbers() -> None:
    under_test = scheduler(context=20)
    under_test.add(sequence("just fits", 10, outputs=10))
    with pytest.raises(RequestError, match=r"make 21 tokens, but the context holds 20"):
        under_test.add(sequence("too long", 10, outputs=11))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="must have at least 1"):
        scheduler().add(sequence("empty", 0, 1))


def test_a_prompt_without_outputs_is_computed_and_needs_no_logits() -> None:
    under_test = scheduler()
    under_test.add(sequence("scored", 3, 0))
    (item,) = under_test.schedule()
    assert (item.num_new_tokens, item.catches_up, item.needs_logits) == (3, True, False)


def test_removing_a_waiting_sequence_forgets_it() -> None:
    under_test = scheduler()
    waiting = sequence("waiting", 3)
    under_test.add(waiting)
    under_test.remove(waiting)
    assert not under_test.has_work
    assert under_test.schedule() == ()


@pytest.mark.parametrize(
    ("seqs", "budget", "context", "setting"),
    [(0, 16, 64, "max_num_seqs"), (17, 16, 64, "max_step_tokens"), (1, 16, 1, "max_model_len")],
)
def test_settings_that_would_starve_a_sequence_are_refused(
    seqs: int, budget: int, context: int, setting: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{setting}="):
        SchedulerConfig(seqs, budget, context)
