"""AttentionBatch: positions, slots and which rows are computed how."""

import pytest
import torch

from moe_core.model.batch import AttentionBatch, SequenceSlice


def test_positions_and_slots_follow_the_block_tables() -> None:
    slices = [SequenceSlice((3, 1), num_computed=3, num_new=3), SequenceSlice((2,), 1, 1)]
    batch = AttentionBatch.build(slices, block_size=4, device="cpu")
    assert batch.positions.tolist() == [3, 4, 5, 1]
    assert batch.slot_mapping.tolist() == [3 * 4 + 3, 1 * 4, 1 * 4 + 1, 2 * 4 + 1]
    assert batch.query_start == (0, 3, 4)
    assert batch.seq_lens == (6, 2)
    assert batch.num_tokens == 4


def test_single_token_sequences_are_padded_to_the_longest_of_them_only() -> None:
    slices = [
        SequenceSlice((1,), 2, 1),
        SequenceSlice((2, 3, 4, 5), 0, 16),
        SequenceSlice((6, 7), 4, 1),
    ]
    batch = AttentionBatch.build(slices, block_size=4, device="cpu")
    decodes = batch.decodes
    assert decodes is not None
    assert decodes.rows is not None
    assert decodes.rows.tolist() == [0, 17]
    assert decodes.block_tables.shape == (2, 2)
    assert decodes.mask.sum(dim=1).tolist() == [3, 5]
    (prefill,) = batch.prefills
    assert (prefill.start, prefill.end, prefill.seq_len) == (1, 17, 16)
    assert prefill.is_first
    assert prefill.block_table.tolist() == [2, 3, 4, 5]


def test_rows_are_implied_where_every_sequence_decodes() -> None:
    batch = AttentionBatch.build([SequenceSlice((0,), 1, 1)] * 3, block_size=4, device="cpu")
    assert batch.decodes is not None
    assert batch.decodes.rows is None
    assert batch.prefills == ()


def test_no_sequences_make_an_empty_batch() -> None:
    batch = AttentionBatch.build([], block_size=4, device="cpu")
    assert batch.num_tokens == 0
    assert batch.decodes is None
    assert batch.positions.shape == (0,)


@pytest.mark.parametrize(
    "part", [SequenceSlice((0,), 2, 3), SequenceSlice((0,), 2, 0), SequenceSlice((), 0, 1)]
)
def test_slice_that_does_not_fit_its_blocks_is_refused(part: SequenceSlice) -> None:
    with pytest.raises(ValueError, match="slice 0"):
        AttentionBatch.build([part], block_size=4, device="cpu")


def test_rows_that_do_not_fit_the_sequences_are_refused() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="query_start"):
        AttentionBatch(empty, empty, empty[:, None], (0, 1), (1, 1), 4)
