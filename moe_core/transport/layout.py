"""Where the tensors of one dispatch and one combine lie, as bytes.

Knows sizes and offsets, and makes typed views of a slot. Knows no wire.

Both tensors and routing of `n` tokens are packed at the front of a slot, so that one
contiguous copy moves exactly the bytes in use:

    dispatch  hidden_states [n, hidden_size] · pad to 64 · physical_ids [n, c] · topk_weights [n, c]
    combine   partial [n, hidden_size]
"""

from ctypes import memmove
from dataclasses import dataclass, field

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
    payload_row: int = field(init=False)
    index_row: int = field(init=False)

    def __post_init__(self) -> None:
        payload_row = self.spec.hidden_size * self.spec.dtype.itemsize
        object.__setattr__(self, "payload_row", payload_row)
        object.__setattr__(self, "index_row", self.spec.num_columns * INDEX_BYTES)

    def payload_bytes(self, num_tokens: int) -> int:
        """Of hidden_states or of a partial: tokens · hidden_size · itemsize."""
        return num_tokens * self.payload_row

    def index_bytes(self, num_tokens: int) -> int:
        """Of physical_ids, and of topk_weights as well."""
        return num_tokens * self.index_row

    def dispatch_bytes(self, num_tokens: int) -> int:
        return align(self.payload_bytes(num_tokens)) + 2 * self.index_bytes(num_tokens)

    @property
    def dispatch_slot_bytes(self) -> int:
        return align(max(self.dispatch_bytes(self.spec.slot_tokens), 1))

    @property
    def combine_slot_bytes(self) -> int:
        return align(max(self.payload_bytes(self.spec.slot_tokens), 1))


class SlotMemory:
    """Typed access to slots that lie one after another in `memory` [bytes] uint8.

    Decode sends one size for long, so the views of a slot's last size are kept.
    """

    def __init__(self, memory: torch.Tensor, spec: LinkSpec, slot_bytes: int) -> None:
        self._layout = SlotLayout(spec)
        self._slot_bytes = slot_bytes
        self._payload_row, self._index_row = self._layout.payload_row, self._layout.index_row
        # A plain memory move needs no view of its target.
        self._address = memory.data_ptr() if memory.is_cpu else 0
        self._values = memory.view(spec.dtype)
        self._ids = memory.view(torch.int32)
        self._weights = memory.view(torch.float32)
        self._payloads: dict[int, torch.Tensor] = {}
        self._routings: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def payload(self, slot: int, num_tokens: int) -> torch.Tensor:
        """[num_tokens, hidden_size] at the front of `slot`."""
        known = self._payloads.get(slot)
        if known is None or known.shape[0] != num_tokens:
            spec = self._layout.spec
            offset = slot * self._slot_bytes // spec.dtype.itemsize
            shape, strides = (num_tokens, spec.hidden_size), (spec.hidden_size, 1)
            known = torch.as_strided(self._values, shape, strides, offset)
            self._payloads[slot] = known
        return known

    def routing(self, slot: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """physical_ids int32 and topk_weights float32, [num_tokens, num_columns] each."""
        known = self._routings.get(slot)
        if known is None or known[0].shape[0] != num_tokens:
            columns = self._layout.spec.num_columns
            start = slot * self._slot_bytes + align(self._layout.payload_bytes(num_tokens))
            offset = start // INDEX_BYTES
            shape, strides = (num_tokens, columns), (columns, 1)
            ids = torch.as_strided(self._ids, shape, strides, offset)
            offset += num_tokens * columns
            known = ids, torch.as_strided(self._weights, shape, strides, offset)
            self._routings[slot] = known
        return known

    def store_payload(self, slot: int, values: torch.Tensor, num_tokens: int) -> int:
        """`values` [num_tokens, hidden_size] to the front of `slot`. Returns the bytes in use."""
        num_bytes = num_tokens * self._payload_row
        if self._address and values.is_cpu and values.is_contiguous():
            memmove(self._address + slot * self._slot_bytes, values.data_ptr(), num_bytes)
        else:
            self.payload(slot, num_tokens).copy_(values)
        return num_bytes

    def store_routing(
        self, slot: int, ids: torch.Tensor, weights: torch.Tensor, num_tokens: int
    ) -> int:
        """[num_tokens, num_columns] each, behind a payload of as many tokens. Returns the bytes in
        use, those of the payload among them."""
        start = align(num_tokens * self._payload_row)
        num_bytes = num_tokens * self._index_row
        if self._address and _movable(ids) and _movable(weights):
            address = self._address + slot * self._slot_bytes + start
            memmove(address, ids.data_ptr(), num_bytes)
            memmove(address + num_bytes, weights.data_ptr(), num_bytes)
        else:
            slot_ids, slot_weights = self.routing(slot, num_tokens)
            slot_ids.copy_(ids)
            slot_weights.copy_(weights)
        return start + 2 * num_bytes


def _movable(values: torch.Tensor) -> bool:
    """On the CPU and row-major: a plain memory move then copies them for a third of what torch
    takes for a few rows, and for many wakes no thread pool, whose workers would spin beside the
    process that we wait for."""
    return values.is_cpu and values.is_contiguous()


def copy_values(target: torch.Tensor, source: torch.Tensor) -> None:
    """`target.copy_(source)`, shapes and dtypes being equal and `target` row-major."""
    if target.is_cpu and _movable(source):
        memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
    else:
        target.copy_(source)
