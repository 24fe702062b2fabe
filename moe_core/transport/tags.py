"""The small headers that travel as NIXL notifications.

Knows their binary form. Knows neither slots' contents nor who is allowed to send what; what
does not have the right length reads as no tag and is for the caller to count.
"""

import struct

from moe_core.transport.base import DispatchKey

PROBE, DISPATCH, COMBINE = 1, 2, 3

# kind, slot, num_tokens, link_id, instance_epoch, sequence
_TAG = struct.Struct("<BxHIQQQ")
# placement_epoch, step, layer_id, microbatch, chunk, attempt
_KEY = struct.Struct("<QQIIII")
_DISPATCH = struct.Struct(_TAG.format + _KEY.format[1:])
# queue_us, compute_us
_TIMES = struct.Struct("<II")
_COMBINE = struct.Struct(_TAG.format + _TIMES.format[1:])
MAX_US = 2**32 - 1


# Which use of which slot of which link between which starts of two processes:
# (kind, slot, num_tokens, link_id, instance_epoch, sequence). A plain tuple, since one is made or
# read at every hop.
Tag = tuple[int, int, int, int, int, int]
NO_TAG: Tag = (0, 0, 0, 0, 0, 0)


def pack_probe(link_id: int, instance_epoch: int) -> bytes:
    return _TAG.pack(PROBE, 0, 0, link_id, instance_epoch, 0)


def pack_dispatch(tag: Tag, key: DispatchKey) -> bytes:
    return _DISPATCH.pack(*tag, *key)


def pack_combine(tag: Tag, queue_us: int, compute_us: int) -> bytes:
    return _COMBINE.pack(*tag, min(queue_us, MAX_US), min(compute_us, MAX_US))


def read_tag(note: bytes) -> Tag:
    """NO_TAG, whose kind is none of the above, for what is not a tag."""
    tag: Tag = _TAG.unpack_from(note) if len(note) >= _TAG.size else NO_TAG
    return tag


def read_key(note: bytes) -> DispatchKey | None:
    """None for what is not a dispatch header."""
    if len(note) != _TAG.size + _KEY.size:
        return None
    return DispatchKey._make(_KEY.unpack_from(note, _TAG.size))


def read_times(note: bytes) -> tuple[int, int]:
    """queue_us and compute_us; zeros for what is not a combine header."""
    if len(note) != _TAG.size + _TIMES.size:
        return 0, 0
    times: tuple[int, int] = _TIMES.unpack_from(note, _TAG.size)
    return times
