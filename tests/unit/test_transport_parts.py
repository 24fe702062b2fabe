"""The parts of the transport that need no peer: slots, layout, headers, retired memory."""

import asyncio
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from moe_core.errors import ConfigError, PeerLostError, TransportError
from moe_core.transport.base import DispatchKey, LinkSpec, TransportOptions
from moe_core.transport.host import HostProcess, start_ticks
from moe_core.transport.layout import SlotLayout, SlotMemory
from moe_core.transport.retired import RetiredMemory
from moe_core.transport.slots import SlotPool
from moe_core.transport.tags import (
    DISPATCH,
    NO_TAG,
    pack_combine,
    pack_dispatch,
    read_key,
    read_tag,
    read_times,
)

SPEC = LinkSpec("fingerprint", torch.bfloat16, 7, 3, 5, 2)
KEY = DispatchKey(2**63, 2**40, 61, 1, 2, 3)
TAG = (DISPATCH, 1, 5, 2**64 - 1, 2**63, 77)


async def test_slots_go_to_those_who_wait_in_the_order_in_which_they_came():
    pool = SlotPool(1)
    slot = pool.take()
    assert slot == 0
    waits = [asyncio.create_task(pool.wait(5.0)) for _ in range(3)]
    await asyncio.sleep(0)
    waits[0].cancel()
    pool.give(slot)
    await asyncio.sleep(0)
    assert pool.take() is None
    assert await waits[1] == slot
    assert not waits[2].done()
    pool.give(slot)
    assert await waits[2] == slot


async def test_a_slot_that_nobody_takes_in_time_is_not_lost():
    pool = SlotPool(1)
    pool.take()
    with pytest.raises(TimeoutError):
        await pool.wait(0.01)
    pool.give(0)
    assert pool.take() == 0


async def test_a_failing_pool_fails_those_who_wait():
    pool = SlotPool(1)
    pool.take()
    wait = asyncio.create_task(pool.wait(5.0))
    await asyncio.sleep(0)
    pool.fail(PeerLostError("gone"))
    with pytest.raises(PeerLostError):
        await wait


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_what_is_stored_in_a_slot_is_read_from_it_and_no_other_is_touched(num_tokens: int):
    slot_bytes = SlotLayout(SPEC).dispatch_slot_bytes
    memory = torch.zeros(3 * slot_bytes, dtype=torch.uint8)
    slots = SlotMemory(memory, SPEC, slot_bytes)
    payload = torch.randn(num_tokens, SPEC.hidden_size).to(SPEC.dtype)
    ids = torch.arange(num_tokens * 3, dtype=torch.int32).view(num_tokens, 3)
    weights = torch.rand(num_tokens, 3)
    slots.store_payload(1, payload, num_tokens)
    slots.store_routing(1, ids, weights, num_tokens)
    assert torch.equal(slots.payload(1, num_tokens), payload)
    assert torch.equal(slots.routing(1, num_tokens)[0], ids)
    assert torch.equal(slots.routing(1, num_tokens)[1], weights)
    assert not memory[:slot_bytes].any()
    assert not memory[2 * slot_bytes :].any()


def test_the_bytes_in_use_are_the_formula():
    layout = SlotLayout(SPEC)
    assert layout.payload_bytes(5) == 5 * 7 * 2
    assert layout.dispatch_bytes(5) == 128 + 2 * 5 * 3 * 4
    assert layout.dispatch_slot_bytes % 64 == 0


def test_headers_read_back_as_they_were_packed():
    note = pack_dispatch(TAG, KEY)
    assert (read_tag(note), read_key(note)) == (TAG, KEY)
    assert read_times(pack_combine(TAG, 2**40, 6)) == (2**32 - 1, 6)


@pytest.mark.parametrize("note", [b"", b"x", pack_dispatch(TAG, KEY)[:-1] + b"yz"])
def test_notes_that_are_no_headers_read_as_none(note: bytes):
    assert read_key(note) is None
    assert read_times(note) == (0, 0)
    assert len(note) >= 32 or read_tag(note) == NO_TAG


def test_a_process_has_exited_only_if_that_is_certain():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = replace(HostProcess.this(), pid=child.pid, start_ticks=start_ticks(child.pid) or 0)
    assert not HostProcess.this().has_exited()
    assert not process.has_exited()
    child.kill()
    child.communicate()
    assert process.has_exited()
    assert not replace(process, host_id="another host").has_exited()
    assert replace(HostProcess.this(), start_ticks=1).has_exited()  # the pid was used again


def test_retired_memory_is_released_when_its_process_ends_and_never_before():
    released: list[str] = []
    gone = replace(HostProcess.this(), pid=os.getpid(), start_ticks=1)
    retired = RetiredMemory(100)
    retired.add(60, "expert 1", HostProcess.this(), lambda: released.append("living"))
    retired.add(30, "expert 2", gone, lambda: released.append("gone"))
    retired.admit(40, "expert 3")
    assert released == ["gone"]
    assert retired.num_bytes == 60
    with pytest.raises(TransportError, match=r"expert 3 is refused: 60 bytes.*\(expert 1\).*=100"):
        retired.admit(41, "expert 3")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"transport": "carrier pigeon"}, "nearest valid: auto"), ({"spin_us": -1.0}, "spin_us")],
)
def test_options_that_cannot_be_are_refused_when_built(options: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        TransportOptions(**options)
