"""Work that computes in a thread that ends with it."""

import asyncio
import threading

import pytest

from moe_core.service.own_thread import in_own_thread


async def test_the_thread_ends_with_its_work():
    thread = await in_own_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()


async def test_what_the_work_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        await in_own_thread(divmod, 1, 0)
