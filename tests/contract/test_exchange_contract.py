"""What every transport promises (moe_core/transport/base.py) of dispatches that are answered."""

import asyncio

import pytest
import torch

from moe_core.transport.base import Dispatch, Reply
from support.exchange_ends import LATE, SPEC, Ends, answer_to, make_dispatch, round_trip, spec_of


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
