"""`epserve top`: a running cluster in a terminal, once a second until Ctrl-C.

Knows when to ask and where to print; what is shown is top_frame.py's. On anything but a terminal
frames follow one another as plain text.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import nullcontext

from rich.console import Console, RenderableType
from rich.live import Live

from epserve.client import EpserveClient
from epserve.gateway_connection import Target
from epserve.rates import ClusterRates
from epserve.stop_signals import run_until_signalled
from epserve.top_frame import frame
from moe_core.cluster import ClusterState

REFRESH_S = 1.0
# Processes report twice a second: over a longer time than one refresh, rates do not jump.
WINDOW = 5


def top(target: Target | str, *, once: bool) -> None:
    """Show frames until a signal; with `once` show one. Raises EpserveError when the gateway does
    not answer."""
    console = Console(highlight=False)
    asyncio.run(_top(target, console, once=once))


async def _top(target: Target | str, console: Console, *, once: bool) -> None:
    await run_until_signalled(_show(target, console, once=once))


async def _show(target: Target | str, console: Console, *, once: bool) -> None:
    is_live = console.is_terminal and not once
    live = Live(console=console, screen=True, auto_refresh=False, vertical_overflow="ellipsis")
    async with EpserveClient(target) as client:
        with live if is_live else nullcontext():
            async for shown in _frames(client):
                if is_live:
                    live.update(shown, refresh=True)
                else:
                    console.print(shown)
                if once:
                    return


async def _frames(client: EpserveClient) -> AsyncIterator[RenderableType]:
    """One a refresh. The first comes after one, since a rate takes two states."""
    states: list[tuple[float, ClusterState]] = [await _ask(client)]
    while True:
        await asyncio.sleep(REFRESH_S)
        states = [*states, await _ask(client)][-WINDOW - 1 :]
        (then, before), (now, after) = states[0], states[-1]
        yield frame(client.target, after, ClusterRates(before, after, now - then))


async def _ask(client: EpserveClient) -> tuple[float, ClusterState]:
    state = await client.cluster(expert_load=True)
    return time.monotonic(), state
