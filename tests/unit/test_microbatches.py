"""How a step is split, and into how many parts."""

import random

import pytest

from attn_service.microbatches import ALWAYS_ONE, MicrobatchRule, split
from attn_service.sequence import SequenceSlice
from moe_core.config.parallel import ParallelConfig
from support.moe_configs import deepseek_v3_model


def slices(*tokens: int) -> list[SequenceSlice]:
    return [SequenceSlice((1,) * count, 0, (), needs_logits=True) for count in tokens]


def test_every_slice_is_in_one_part_whole_and_parts_differ_by_at_most_the_longest() -> None:
    draw = random.Random(5)
    for _ in range(300):
        tokens = [draw.choice([1, 1, 1, 7, 64, 300]) for _ in range(draw.randint(1, 20))]
        count = draw.randint(1, min(3, len(tokens)))
        parts = split(slices(*tokens), count)
        assert sorted(index for part in parts for index in part) == list(range(len(tokens)))
        assert len(parts) == count
        assert all(part and part == sorted(part) for part in parts)
        sums = [sum(tokens[index] for index in part) for part in parts]
        assert max(sums) - min(sums) <= max(tokens)


def test_a_long_prompt_does_not_share_its_part_with_the_decodes() -> None:
    assert split(slices(1, 1, 200, 1, 1), 2) == [[2], [0, 1, 3, 4]]
    assert split(slices(1, 1, 1, 1, 1), 2) == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize("count", [0, 4])
def test_parts_without_a_sequence_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} micro-batches of 3 sequences"):
        split(slices(1, 1, 1), count)


@pytest.mark.parametrize(("wanted", "sequences", "count"), [(3, 5, 3), (3, 2, 2), (1, 5, 1)])
def test_a_number_is_taken_at_its_word_as_far_as_there_are_sequences(
    wanted: int, sequences: int, count: int
) -> None:
    assert MicrobatchRule(wanted).count(slices(*[1] * sequences)) == count
    assert ALWAYS_ONE.count(slices(*[1] * sequences)) == 1


@pytest.mark.parametrize(
    ("tokens", "count"),
    [
        ((100, 100), 2),
        ((100, 99), 1),
        ((250,), 1),  # one sequence cannot be split
        ((400, 1, 1, 1), 1),  # what is left beside it is too little to overlap
        ((150, 60, 60), 2),
        ((1,) * 199, 1),
        ((1,) * 200, 2),
    ],
)
def test_auto_takes_two_where_each_has_enough_tokens(tokens: tuple[int, ...], count: int) -> None:
    assert MicrobatchRule(None, min_tokens=100).count(slices(*tokens)) == count


@pytest.mark.parametrize(
    ("dp_size", "min_tokens"),
    # 32 tokens for each of 256 experts, of which a token chooses 8.
    [(1, 32 * 256 // 8), (2, 32 * 256 // 8 // 2), (8, 256)],
)
def test_auto_wants_enough_tokens_for_every_expert_from_all_groups_together(
    dp_size: int, min_tokens: int
) -> None:
    model = deepseek_v3_model()
    assert (model.moe.num_experts, model.moe.num_experts_per_tok) == (256, 8)
    parallel = ParallelConfig(attn_devices=8, dp_size=dp_size)
    rule = MicrobatchRule.of("auto", model, parallel, shares_device=False)
    assert rule == MicrobatchRule(None, min_tokens)


def test_auto_is_one_where_the_tiers_share_a_device_and_a_number_is_not() -> None:
    model, parallel = deepseek_v3_model(), ParallelConfig()
    assert MicrobatchRule.of("auto", model, parallel, shares_device=True) == ALWAYS_ONE
    assert MicrobatchRule.of("2", model, parallel, shares_device=True) == MicrobatchRule(2)
