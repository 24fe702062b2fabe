import pytest

from attn_service.kv_blocks import BlockPool
from attn_service.scheduler import Scheduler, SchedulerConfig
from attn_service.sequence import Sampling, Sequence, SequenceRequest
from moe_core.errors import ConfigError, RequestError


def sequence(name: str, prompt: int, outputs: int = 4) -> Sequence:
    return Sequence(SequenceRequest(name, (1,) * prompt, Sampling(max_tokens=outputs)))


def scheduler(
    *, seqs: int = 4, budget: int = 16, context: int = 64, blocks: int = 32, block_size: int = 4
) -> Scheduler:
    return Scheduler(SchedulerConfig(seqs, budget, context), BlockPool(blocks, block_size))


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


@pytest.mark.parametrize(("prompt", "outputs"), [(0, 1), (1, 0)])
def test_an_empty_prompt_or_no_output_is_refused(prompt: int, outputs: int) -> None:
    with pytest.raises(RequestError, match="must be at least 1"):
        scheduler().add(sequence("empty", prompt, outputs))


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
