"""Where the tensors of one dispatch and one combine lie, as bytes.

Knows sizes and offsets, and makes typed views of a slot. Knows no wire.

Both tensors and routing of `n` tokens are packed at the front of a slot, so that one
contiguous copy moves exactly the bytes in use:

    dispatch  hidden_states [n, hidden_size] · pad to 64 · physical_ids [n, c] · topk_weights [n, c]
    combine   partial [n, hidden_size]
"""

from dataclasses import dataclass

import torch

from moe_core.transport.base import LinkSpec

ALIGNMENT = 64
INDEX_BYTES = 4  # int32 physical ids and float32 weights alike


def align(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """The formulas, for one LinkSpec. All sizes are bytes."""

    spec: LinkSpec

    def payload_bytes(self, num_tokens: int) -> int:
        """Of hidden_states or of a partial: tokens · hidden_size · itemsize."""
        return num_tokens * self.spec.hidden_size * self.spec.dtype.itemsize

    def index_bytes(self, num_tokens: int) -> int:
        """Of physical_ids, and of topk_weights as well."""
        return num_tokens * self.spec.num_columns * INDEX_BYTES

    def dispatch_bytes(self, num_tokens: int) -> int:
        return align(self.payload_bytes(num_tokens)) + 2 * self.index_bytes(num_tokens)

    @property
    def dispatch_slot_bytes(self) -> int:
        return align(max(self.dispatch_bytes(self.spec.slot_tokens), 1))

    @property
    def combine_slot_bytes(self) -> int:
        return align(max(self.payload_bytes(self.spec.slot_tokens), 1))


class SlotViews:
    """Typed views into slots that lie one after another in `memory` [bytes] uint8.

    as_strided makes each view in one operation, whatever `num_tokens` is.
    """

    def __init__(self, memory: torch.Tensor, spec: LinkSpec, slot_bytes: int) -> None:
        self._layout = SlotLayout(spec)
        self._slot_bytes = slot_bytes
        self._values = memory.view(spec.dtype)
        self._ids = memory.view(torch.int32)
        self._weights = memory.view(torch.float32)

    def payload(self, slot: int, num_tokens: int) -> torch.Tensor:
        """[num_tokens, hidden_size] at the front of `slot`."""
        spec = self._layout.spec
        offset = slot * self._slot_bytes // spec.dtype.itemsize
        return torch.as_strided(
            self._values, (num_tokens, spec.hidden_size), (spec.hidden_size, 1), offset
        )

    def routing(self, slot: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """physical_ids int32 and topk_weights float32, [num_tokens, num_columns] each."""
        columns = self._layout.spec.num_columns
        start = slot * self._slot_bytes + align(self._layout.payload_bytes(num_tokens))
        offset = start // INDEX_BYTES
        shape, strides = (num_tokens, columns), (columns, 1)
        ids = torch.as_strided(self._ids, shape, strides, offset)
        weights = torch.as_strided(self._weights, shape, strides, offset + num_tokens * columns)
        return ids, weights
