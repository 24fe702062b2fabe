"""What every transport promises (moe_core/transport/base.py), over all three of them."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import torch

from moe_core.errors import PeerFailedError, PeerLostError, PeerTimeoutError
from moe_core.transport.base import Dispatch, ExpertLink, Reply
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
    spec_of,
    until,
)


@pytest.fixture(params=["local", "grpc", "nixl"])
async def ends(request: pytest.FixtureRequest) -> AsyncIterator[Ends]:
    made = Ends(request.param)
    async with made.stack:
        yield made


async def round_trip(link: ExpertLink, dispatch: Dispatch) -> torch.Tensor:
    pending = await link.dispatch(dispatch, 5.0)
    combine = await pending.wait(5.0)
    assert combine.key == dispatch.key
    partial = combine.partial.clone()
    pending.release()
    return partial


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_tokens", [1, 7, 8])
async def test_values_arrive_bit_exact(ends: Ends, dtype: torch.dtype, num_tokens: int):
    spec = spec_of(dtype)
    link = await ends.link(spec)
    for step in range(3):
        dispatch = make_dispatch(num_tokens, spec, step=step)
        assert torch.equal(await round_trip(link, dispatch), answer_to(dispatch))


async def test_the_handler_sees_what_was_sent(ends: Ends):
    seen: list[Dispatch] = []

    def keep(dispatch: Dispatch, reply: Reply) -> None:
        tensors = dispatch.hidden_states, dispatch.physical_ids, dispatch.topk_weights
        seen.append(Dispatch(dispatch.key, *(tensor.clone() for tensor in tensors)))
        reply.complete(dispatch.hidden_states, 0, 0)

    dispatch = make_dispatch(5, SPEC)
    await round_trip(await ends.link(SPEC, keep), dispatch)
    (received,) = seen
    assert received.key == dispatch.key
    assert torch.equal(received.hidden_states, dispatch.hidden_states)
    assert torch.equal(received.physical_ids, dispatch.physical_ids)
    assert torch.equal(received.topk_weights, dispatch.topk_weights)


async def test_zero_tokens_are_a_dispatch_like_any_other(ends: Ends):
    link = await ends.link(SPEC)
    assert (await round_trip(link, make_dispatch(0, SPEC))).shape == (0, SPEC.hidden_size)


@pytest.mark.parametrize("num_tokens", [9, 24, 61])
async def test_a_batch_larger_than_a_slot_is_one_dispatch_and_one_combine(
    ends: Ends, num_tokens: int
):
    link = await ends.link(SPEC)
    dispatch = make_dispatch(num_tokens, SPEC)
    assert torch.equal(await round_trip(link, dispatch), answer_to(dispatch))
    assert link.counters.dispatches == -(-num_tokens // SPEC.slot_tokens)


async def test_many_in_flight_each_get_their_own_answer(ends: Ends):
    link = await ends.link(SPEC)
    dispatches = [make_dispatch(1 + step % 20, SPEC, step=step) for step in range(40)]
    answers = await asyncio.gather(*(round_trip(link, dispatch) for dispatch in dispatches))
    for dispatch, answer in zip(dispatches, answers, strict=True):
        assert torch.equal(answer, answer_to(dispatch))


async def test_dispatches_reach_the_handler_in_the_order_in_which_they_were_sent(ends: Ends):
    seen: list[int] = []

    def note(dispatch: Dispatch, reply: Reply) -> None:
        seen.append(dispatch.key.step)
        reply.complete(dispatch.hidden_states, 0, 0)

    link = await ends.link(SPEC, note)
    for start in range(0, 30, SPEC.slot_count):
        steps = range(start, start + SPEC.slot_count)
        pending = [await link.dispatch(make_dispatch(2, SPEC, step=s), 5.0) for s in steps]
        for one in pending:
            await one.wait(5.0)
            one.release()
    assert seen == list(range(30))


async def test_answers_may_come_in_any_order(ends: Ends):
    waiting: list[tuple[Dispatch, Reply]] = []

    def hold(dispatch: Dispatch, reply: Reply) -> None:
        waiting.append((dispatch, reply))
        if len(waiting) == SPEC.slot_count:
            for held, answer in reversed(waiting):
                answer.complete(answer_to(held), 0, 0)

    link = await ends.link(SPEC, hold)
    dispatches = [make_dispatch(3, SPEC, step=step) for step in range(SPEC.slot_count)]
    pending = [await link.dispatch(dispatch, 5.0) for dispatch in dispatches]
    for dispatch, one in zip(dispatches, pending, strict=True):
        assert torch.equal((await one.wait(5.0)).partial, answer_to(dispatch))


async def test_the_caller_may_reuse_its_tensors_after_dispatch(ends: Ends):
    link = await ends.link(SPEC)
    dispatch = make_dispatch(8, SPEC, layer=LATE)
    wanted = answer_to(dispatch)
    pending = await link.dispatch(dispatch, 5.0)
    dispatch.hidden_states.zero_()
    dispatch.topk_weights.zero_()
    assert torch.equal((await pending.wait(5.0)).partial, wanted)


async def test_a_combine_stays_what_it_is_and_keeps_its_slot_until_it_is_released(ends: Ends):
    link = await ends.link(SPEC)
    dispatch = make_dispatch(8, SPEC)
    held = [await link.dispatch(dispatch, 5.0) for _ in range(SPEC.slot_count - 1)]
    partials = [(await one.wait(5.0)).partial for one in held]
    for step in range(1, 10):
        await round_trip(link, make_dispatch(8, SPEC, step=step))
    assert all(torch.equal(partial, answer_to(dispatch)) for partial in partials)
    last = await link.dispatch(dispatch, 5.0)
    await last.wait(5.0)
    assert link.try_dispatch(dispatch) is None
    last.release()
    last.release()
    again = link.try_dispatch(dispatch)
    assert again is not None
    await again.left(5.0)
    assert link.try_dispatch(dispatch) is None, "a slot that was released twice was given twice"
    assert torch.equal((await again.wait(5.0)).partial, answer_to(dispatch))


async def test_what_does_not_fit_a_slot_is_not_sent_at_once(ends: Ends):
    link = await ends.link(SPEC)
    assert link.try_dispatch(make_dispatch(SPEC.slot_tokens + 1, SPEC)) is None
    assert link.counters.dispatches == 0


async def test_times_of_the_peer_are_reported(ends: Ends):
    link = await ends.link(SPEC)
    combine = await (await link.dispatch(make_dispatch(2, SPEC), 5.0)).wait(5.0)
    assert (combine.queue_us, combine.compute_us) == (3, 4)


async def test_payload_counters_equal_the_formula(ends: Ends):
    link = await ends.link(SPEC)
    for num_tokens in (0, 1, 8, 19):
        await round_trip(link, make_dispatch(num_tokens, SPEC))
    tokens = 0 + 1 + 8 + 19
    assert link.counters.dispatch_tokens == tokens
    assert link.counters.dispatch_bytes == tokens * SPEC.hidden_size * 4
    assert link.counters.combine_bytes == tokens * SPEC.hidden_size * 4
    assert link.counters.routing_bytes == tokens * SPEC.num_columns * 8
    assert (link.counters.stream_tensor_bytes == 0) is (ends.transport != "grpc")


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
    with pytest.raises(PeerTimeoutError, match=r"expert.*layer 2, 2 tokens, 192 bytes.*compute"):
        await pending.wait(0.05)


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


async def test_two_attention_processes_do_not_meet(ends: Ends):
    links = await ends.links(SPEC, 2)
    dispatches = [make_dispatch(1 + step % 12, SPEC, step=step) for step in range(30)]
    answers = await asyncio.gather(
        *(round_trip(links[step % 2], dispatch) for step, dispatch in enumerate(dispatches))
    )
    for dispatch, answer in zip(dispatches, answers, strict=True):
        assert torch.equal(answer, answer_to(dispatch))


async def test_tensors_that_do_not_fit_the_link_are_refused_before_anything_is_sent(ends: Ends):
    link = await ends.link(SPEC)
    good = make_dispatch(2, SPEC)
    wide = torch.zeros(2, SPEC.hidden_size + 1)
    with pytest.raises(ValueError, match=r"hidden_states is torch.float32 \[2, 25\].*\[2, 24\]"):
        await link.dispatch(Dispatch(good.key, wide, good.physical_ids, good.topk_weights), 1.0)
    with pytest.raises(ValueError, match=r"physical_ids is torch.int64"):
        await link.dispatch(
            Dispatch(good.key, good.hidden_states, good.physical_ids.long(), good.topk_weights), 1.0
        )
    assert link.counters.dispatches == 0


async def test_tensors_that_are_not_row_major_are_carried_all_the_same(ends: Ends):
    link = await ends.link(SPEC)
    good = make_dispatch(6, SPEC)
    strided = Dispatch(
        good.key,
        good.hidden_states.t().contiguous().t(),
        good.physical_ids.t().contiguous().t(),
        good.topk_weights.t().contiguous().t(),
    )
    assert torch.equal(await round_trip(link, strided), answer_to(good))


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
