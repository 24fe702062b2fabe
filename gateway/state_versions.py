"""The cluster's state, version by version, for whoever waits for the next.

Knows a number that grows, and who waits for it. Knows not what is in a state, nor when it is new.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable

from moe_core.cluster import ClusterState
from moe_core.errors import UnavailableError


class StateVersions:
    """`state` gives the state of the current version."""

    def __init__(self, state: Callable[[], ClusterState]) -> None:
        self._state = state
        self._closed = False
        self._changed = asyncio.Event()
        self.current = 1

    def publish(self) -> None:
        """What others act upon has changed."""
        self.current += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def close(self) -> None:
        """This gateway leaves: `states` end."""
        self._closed = True
        self.publish()

    async def newer_than(self, version: int) -> ClusterState:
        """Waits for a state whose version is above `version`; without a deadline, since a
        cluster may stay as it is for ever."""
        while self.current <= version:
            await self._changed.wait()
        return self._state()

    async def states(self) -> AsyncGenerator[ClusterState, None]:
        """The state now and whenever it has changed, until `close`; who is slow skips some."""
        version = 0
        while True:
            state = await self.newer_than(version)
            if self._closed:
                return
            version = state.version
            yield state

    async def until_none(
        self, lagging: Callable[[ClusterState], Iterable[str]], timeout_s: float
    ) -> None:
        """Until `lagging` has nobody left to name. Raises UnavailableError with its last words
        after `timeout_s`, and whatever it raises."""
        state, words = self._state(), ""
        try:
            async with asyncio.timeout(timeout_s):
                while words := "; ".join(lagging(state)):
                    state = await self.newer_than(state.version)
        except TimeoutError:
            raise UnavailableError(f"not done within {timeout_s:g} s: {words}") from None
