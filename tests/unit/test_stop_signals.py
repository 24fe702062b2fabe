"""Signals end the work, and its clean-up still runs."""

import asyncio
import os
import signal

import pytest

from epserve.stop_signals import run_until_signalled


class Work:
    def __init__(self) -> None:
        self.cleaned_up = False
        self.cut_short = False

    async def run(self, number: signal.Signals, clean_up_s: float = 0.0) -> None:
        try:
            os.kill(os.getpid(), number)
            await asyncio.sleep(30)
        finally:
            try:
                await asyncio.sleep(clean_up_s)
                self.cleaned_up = True
            except asyncio.CancelledError:
                self.cut_short = True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_cancels_the_work_and_lets_it_clean_up(number: signal.Signals):
    work, told = Work(), []
    # Whoever started the tests may have told them to ignore it, as nohup does SIGHUP.
    before = signal.signal(number, signal.default_int_handler)
    try:
        assert await run_until_signalled(work.run(number), lambda: told.append("stopping"))
    finally:
        signal.signal(number, before)
    assert work.cleaned_up
    assert told == ["stopping"]


async def test_a_second_signal_cuts_the_clean_up_short():
    work = Work()
    asyncio.get_running_loop().call_later(0.2, os.kill, os.getpid(), signal.SIGINT)
    await run_until_signalled(work.run(signal.SIGINT, clean_up_s=30))
    assert work.cut_short


async def test_work_that_ends_by_itself_was_not_signalled():
    assert not await run_until_signalled(asyncio.sleep(0))


async def test_an_error_of_the_work_surfaces():
    async def fails() -> None:
        raise ConnectionError("no")

    with pytest.raises(ConnectionError):
        await run_until_signalled(fails())


async def test_hangups_stay_ignored_under_nohup():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:

        async def survives() -> None:
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.05)

        assert not await run_until_signalled(survives())
    finally:
        signal.signal(signal.SIGHUP, previous)
