from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from attn_service.sequence import Sampling, Sequence, SequenceRequest
from attn_service.token_counts import TokenCounts

TOKENS = st.lists(st.integers(0, 9), max_size=20)


@given(TOKENS, TOKENS, TOKENS)
def test_every_token_is_there_once_with_how_often_it_was_generated(
    prompt_ids: list[int], before: list[int], later: list[int]
) -> None:
    counts = TokenCounts(prompt_ids, before)
    for token_id in later:
        counts.add(token_id)
    generated = Counter(before + later)
    assert dict(zip(counts.ids, counts.counts, strict=True)) == {
        token_id: generated[token_id] for token_id in {*prompt_ids, *before, *later}
    }
    assert len(set(counts.ids)) == len(counts.ids)


def test_a_sequence_counts_only_where_its_settings_ask_for_it() -> None:
    def sequence(**penalties: float) -> Sequence:
        sampling = Sampling(max_tokens=5, **penalties)
        return Sequence(SequenceRequest("s", (1, 2, 1), sampling, output_ids=(3,)))

    assert sequence().token_counts is None
    repeating = sequence(repetition_penalty=1.2)
    repeating.append(2)
    assert repeating.token_counts is not None
    assert list(repeating.token_counts.ids) == [1, 2, 3]
    assert list(repeating.token_counts.counts) == [0, 1, 1]
    frequent = sequence(frequency_penalty=1.0)  # to which the prompt does not matter
    assert frequent.token_counts is not None
    assert list(frequent.token_counts.ids) == [3]


def test_outputs_from_before_count_as_outputs() -> None:
    sequence = Sequence(SequenceRequest("s", (1, 2), Sampling(max_tokens=3), output_ids=(3, 4)))
    assert (sequence.num_tokens, sequence.num_output_tokens) == (4, 2)
    assert sequence.append(5) == "length"
