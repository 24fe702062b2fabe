"""What every transport promises of dispatches that fail, are late, are given up, or outlive their
link."""

import asyncio

import pytest
import torch

from moe_core.errors import PeerFailedError, PeerLostError, PeerTimeoutError
from support.exchange_ends import (
    ANSWER,
    CRASH,
    FAIL,
    LATE,
    LATE_S,
    SILENT,
    SPEC,
    Ends,
    answer_to,
    make_dispatch,
    round_trip,
    until,
)


async def test_a_failed_dispatch_names_peer_layer_and_reason_and_frees_its_slot(ends: Ends):
    link = await ends.link(SPEC)
    for _ in range(2 * SPEC.slot_count):
        pending = await link.dispatch(make_dispatch(2, SPEC, layer=FAIL), 5.0)
        with pytest.raises(PeerFailedError, match=r"expert.*layer 1.*expert 17 has gone") as caught:
            await pending.wait(5.0)
        assert caught.value.code == "UNAVAILABLE"
    dispatch = make_dispatch(2, SPEC)
    assert torch.equal(await round_trip(link, dispatch), answer_to(dispatch))


async def test_a_handler_that_raises_fails_its_dispatch_only_and_is_reported(ends: Ends):
    reported: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    link = await ends.link(SPEC)
    pending = await link.dispatch(make_dispatch(2, SPEC, layer=CRASH), 5.0)
    with pytest.raises(PeerFailedError, match="a mistake in the handler"):
        await pending.wait(5.0)
    assert isinstance(reported[0]["exception"], ZeroDivisionError)
    await round_trip(link, make_dispatch(2, SPEC))


async def test_a_wait_ends_at_its_deadline_and_says_what_it_waited_for(ends: Ends):
    link = await ends.link(SPEC)
    pending = await link.dispatch(make_dispatch(2, SPEC, layer=SILENT), 5.0)
    words = r"expert.*layer 2, 2 tokens, 192 bytes, phase: queue \(it waits for its turn"
    with pytest.raises(PeerTimeoutError, match=words):
        await pending.wait(0.05)


async def test_an_answer_that_comes_while_its_phase_is_asked_for_counts(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
):
    link, dispatch = await ends.link(SPEC), make_dispatch(2, SPEC, layer=LATE)

    async def asked(slot: int, sequence: int) -> str:
        await asyncio.sleep(2 * LATE_S)
        return "compute"

    monkeypatch.setattr(link, "_phase_of", asked)
    pending = await link.dispatch(dispatch, 5.0)
    assert torch.equal((await pending.wait(0.0)).partial, answer_to(dispatch))
    pending.release()


async def test_a_dispatch_without_a_free_slot_ends_at_its_deadline(ends: Ends):
    link = await ends.link(SPEC)
    for _ in range(SPEC.slot_count):
        await link.dispatch(make_dispatch(2, SPEC, layer=SILENT), 5.0)
    with pytest.raises(PeerTimeoutError, match=r"layer 0.*queue: all 3 slots are in flight"):
        await link.dispatch(make_dispatch(2, SPEC), 0.05)


async def test_a_late_answer_is_dropped_and_counted_and_frees_its_slot(ends: Ends):
    link = await ends.link(SPEC)
    pending = await link.dispatch(make_dispatch(2, SPEC, layer=LATE), 5.0)
    with pytest.raises(PeerTimeoutError):
        await pending.wait(LATE_S / 10)
    await until(lambda: link.counters.dropped == 1)
    for step in range(2 * SPEC.slot_count):
        dispatch = make_dispatch(8, SPEC, step=step)
        assert torch.equal(await round_trip(link, dispatch), answer_to(dispatch))


async def test_a_cancelled_wait_keeps_its_slot_until_the_answer_is_there(ends: Ends):
    link = await ends.link(SPEC)
    waits = []
    for _ in range(SPEC.slot_count):
        pending = await link.dispatch(make_dispatch(2, SPEC, layer=LATE), 5.0)
        waits.append(asyncio.create_task(pending.wait(5.0)))
    await asyncio.sleep(0)
    for wait in waits:
        wait.cancel()
    await asyncio.gather(*waits, return_exceptions=True)
    with pytest.raises(PeerTimeoutError, match="slots are in flight"):
        await link.dispatch(make_dispatch(2, SPEC), LATE_S / 10)
    dispatch = make_dispatch(8, SPEC)
    assert torch.equal(await round_trip(link, dispatch), answer_to(dispatch))
    await until(lambda: link.counters.dropped == SPEC.slot_count)


async def test_a_cancelled_dispatch_leaves_the_link_in_order(ends: Ends):
    link = await ends.link(SPEC)
    task = asyncio.create_task(link.dispatch(make_dispatch(40, SPEC, layer=LATE), 5.0))
    await asyncio.sleep(LATE_S / 10)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    dispatch = make_dispatch(40, SPEC)
    assert torch.equal(await round_trip(link, dispatch), answer_to(dispatch))


async def test_an_answer_to_something_else_is_dropped_and_counted(ends: Ends):
    link = await ends.link(SPEC)
    pending = await link.dispatch(make_dispatch(2, SPEC, layer=LATE), 5.0)
    ((slot, in_flight),) = link._in_flight.items()
    free = (slot + 1) % SPEC.slot_count
    link._answered(slot, 10**6, torch.zeros(2, SPEC.hidden_size), 0, 0)
    link._answered(free, in_flight.sequence, torch.zeros(2, SPEC.hidden_size), 0, 0)
    assert link.counters.dropped == 2
    wanted = answer_to(make_dispatch(2, SPEC, layer=LATE))
    assert torch.equal((await pending.wait(5.0)).partial, wanted)


async def test_closing_fails_what_is_outstanding_and_all_that_follows(ends: Ends):
    link = await ends.link(SPEC)
    pending = await link.dispatch(make_dispatch(2, SPEC, layer=SILENT), 5.0)
    wait = asyncio.create_task(pending.wait(5.0))
    await asyncio.sleep(0)
    await link.close()
    with pytest.raises(PeerLostError, match="layer 2"):
        await wait
    with pytest.raises(PeerLostError):
        await link.dispatch(make_dispatch(2, SPEC, layer=ANSWER), 5.0)


async def test_a_look_at_whether_it_has_been_answered_gives_nothing_up(ends: Ends):
    link = await ends.link(SPEC)
    dispatch = make_dispatch(4, SPEC, layer=LATE)
    pending = await link.dispatch(dispatch, 5.0)
    assert not await pending.settled(0.02)
    assert (pending.done, pending.owed) == (False, True)
    looking = asyncio.create_task(pending.settled(5.0))
    await asyncio.sleep(0.02)
    looking.cancel()
    assert await pending.settled(5.0)
    assert (pending.done, pending.owed) == (True, False)
    assert torch.equal(pending.result().partial, answer_to(dispatch))
    pending.release()


async def test_what_is_not_wanted_any_more_is_owed_until_it_is_answered(ends: Ends):
    link = await ends.link(SPEC)
    pending = await link.dispatch(make_dispatch(4, SPEC, layer=LATE), 5.0)
    pending.release()
    assert pending.owed
    await until(lambda: not pending.owed)
    silent = await link.dispatch(make_dispatch(4, SPEC, layer=SILENT), 5.0)
    assert silent.owed
    await link.close()
    assert (silent.done, silent.owed) == (True, False)
    with pytest.raises(PeerLostError):
        silent.result()
