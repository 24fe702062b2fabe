"""One step's tokens, as attention needs to see them.

Knows positions, cache slots and which rows belong to which sequence. Knows no requests, no
block allocator and no model.

Rows are grouped by sequence, in order: sequence i owns rows query_start[i] to
query_start[i+1]-1, and they are the last of its seq_lens[i] tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """The next num_new tokens of a sequence of which num_computed are in the cache.

    block_ids: its blocks in order, enough for num_computed + num_new tokens.
    """

    block_ids: Sequence[int]
    num_computed: int
    num_new: int

    @property
    def seq_len(self) -> int:
        return self.num_computed + self.num_new


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The sequences with one new token, padded to the longest of them.

    A padded block table entry may name any block: the mask hides what it holds.
    """

    rows: Tensor | None  # [num_decodes] int64; None where they are all rows, in order
    block_tables: Tensor  # [num_decodes, blocks of the longest] int64
    mask: Tensor  # [num_decodes, blocks · block_size] bool, True where a token is


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """One sequence with several new tokens."""

    start: int
    end: int
    seq_len: int
    block_table: Tensor  # [blocks of this sequence] int64

    @property
    def num_new(self) -> int:
        return self.end - self.start

    @property
    def is_first(self) -> bool:
        """Nothing of the sequence is in the cache yet."""
        return self.num_new == self.seq_len


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    positions: Tensor  # [n] int64
    slot_mapping: Tensor  # [n] int64, block · block_size + offset
    block_tables: Tensor  # [num_seqs, max_blocks] int64
    query_start: tuple[int, ...]  # [num_seqs + 1]
    seq_lens: tuple[int, ...]  # computed and new tokens
    block_size: int
    decodes: DecodeRows | None = field(init=False)
    prefills: tuple[PrefillRows, ...] = field(init=False)

    def __post_init__(self) -> None:
        counts = [e - s for s, e in zip(self.query_start, self.query_start[1:], strict=False)]
        if len(counts) != len(self.seq_lens) or min(counts, default=1) < 1:
            raise ValueError(f"query_start={self.query_start} does not fit {self.seq_lens=}")
        single = [i for i, count in enumerate(counts) if count == 1]
        longer = [i for i, count in enumerate(counts) if count > 1]
        object.__setattr__(self, "decodes", self._decode_rows(single) if single else None)
        object.__setattr__(self, "prefills", tuple(self._prefill_rows(i) for i in longer))

    @property
    def num_tokens(self) -> int:
        return self.query_start[-1]

    @staticmethod
    def build(
        slices: Sequence[SequenceSlice], block_size: int, device: torch.device | str
    ) -> "AttentionBatch":
        """Raises ValueError where a slice is empty or its blocks do not hold its tokens."""
        positions: list[int] = []
        slots: list[int] = []
        query_start = [0]
        for index, part in enumerate(slices):
            if part.num_new < 1 or part.seq_len > len(part.block_ids) * block_size:
                raise ValueError(f"slice {index} does not fit its blocks of {block_size}: {part}")
            new = range(part.num_computed, part.seq_len)
            positions.extend(new)
            slots.extend(part.block_ids[p // block_size] * block_size + p % block_size for p in new)
            query_start.append(len(positions))
        width = max((len(part.block_ids) for part in slices), default=0)
        tables = [[*part.block_ids, *[0] * (width - len(part.block_ids))] for part in slices]
        return AttentionBatch(
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
            block_tables=torch.tensor(tables, dtype=torch.int64, device=device),
            query_start=tuple(query_start),
            seq_lens=tuple(part.seq_len for part in slices),
            block_size=block_size,
        )

    def _decode_rows(self, sequences: list[int]) -> DecodeRows:
        device = self.positions.device
        lengths = torch.tensor([self.seq_lens[i] for i in sequences], device=device)
        num_blocks = -(-max(self.seq_lens[i] for i in sequences) // self.block_size)
        every = len(sequences) == len(self.seq_lens)
        chosen = self.block_tables if every else self.block_tables[sequences]
        starts = [self.query_start[i] for i in sequences]
        offsets = torch.arange(num_blocks * self.block_size, device=device)
        return DecodeRows(
            rows=None if every else torch.tensor(starts, dtype=torch.int64, device=device),
            block_tables=chosen[:, :num_blocks].long(),
            mask=offsets < lengths[:, None],  # [num_decodes, blocks · block_size]
        )

    def _prefill_rows(self, sequence: int) -> PrefillRows:
        num_blocks = -(-self.seq_lens[sequence] // self.block_size)
        return PrefillRows(
            start=self.query_start[sequence],
            end=self.query_start[sequence + 1],
            seq_len=self.seq_lens[sequence],
            block_table=self.block_tables[sequence, :num_blocks].long(),
        )
