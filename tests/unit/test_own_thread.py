"""Work that computes in a thread that ends with it."""

import asyncio
import os
import threading

import pytest

from moe_core.service.own_thread import MOST_NICE, gently, in_own_thread


async def test_the_thread_ends_with_its_work():
    thread = await in_own_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()


async def test_what_the_work_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        await in_own_thread(divmod, 1, 0)


def own_niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


@pytest.mark.parametrize("more", [0, 3, MOST_NICE])
async def test_gentle_work_lowers_the_priority_of_its_own_thread_alone(more: int):
    before = own_niceness()
    assert await in_own_thread(gently(more, own_niceness)) == min(before + more, MOST_NICE)
    assert own_niceness() == before
    assert await in_own_thread(own_niceness) == before


async def test_a_gentle_thread_may_be_made_gentler_still():
    work = gently(2, gently(3, own_niceness))
    assert await in_own_thread(work) == min(own_niceness() + 5, MOST_NICE)
