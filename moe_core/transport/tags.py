"""The small headers that travel as NIXL notifications.

Knows their binary form. Knows neither slots' contents nor who is allowed to send what; what does
not have the right length and kind reads as None and is for the caller to count.
"""

import struct
from typing import NamedTuple

from moe_core.transport.base import DispatchKey

PROBE, DISPATCH, COMBINE = 1, 2, 3

# kind, slot, num_tokens, link_id, instance_epoch, sequence
_TAG = struct.Struct("<BxHIQQQ")
# placement_epoch, step, layer_id, microbatch, chunk, attempt
_KEY = struct.Struct("<QQIIII")
# queue_us, compute_us
_TIMES = struct.Struct("<II")
MAX_US = 2**32 - 1


class Tag(NamedTuple):
    """Which use of which slot of which link between which starts of two processes."""

    kind: int
    slot: int
    num_tokens: int
    link_id: int
    instance_epoch: int
    sequence: int


def pack_probe(link_id: int, instance_epoch: int) -> bytes:
    return _TAG.pack(PROBE, 0, 0, link_id, instance_epoch, 0)


def pack_dispatch(tag: Tag, key: DispatchKey) -> bytes:
    return _TAG.pack(*tag) + _KEY.pack(
        key.placement_epoch, key.step, key.layer_id, key.microbatch, key.chunk, key.attempt
    )


def pack_combine(tag: Tag, queue_us: int, compute_us: int) -> bytes:
    return _TAG.pack(*tag) + _TIMES.pack(min(queue_us, MAX_US), min(compute_us, MAX_US))


def read_tag(note: bytes) -> Tag | None:
    return Tag._make(_TAG.unpack_from(note)) if len(note) >= _TAG.size else None


def read_key(note: bytes) -> DispatchKey | None:
    if len(note) != _TAG.size + _KEY.size:
        return None
    return DispatchKey(*_KEY.unpack_from(note, _TAG.size))


def read_times(note: bytes) -> tuple[int, int] | None:
    if len(note) != _TAG.size + _TIMES.size:
        return None
    queue_us, compute_us = _TIMES.unpack_from(note, _TAG.size)
    return queue_us, compute_us
