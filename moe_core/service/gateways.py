"""The gateways that may register a worker, and how long it goes on asking them.

Knows addresses, whose turn it is, deadlines, and which refusals are final. Knows not what a worker
tells a gateway: one attempt with one gateway is a function of the caller's.

Where several gateways share a registry the one that leads takes the worker, and the others refuse
for the time being: each is asked in turn.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import structlog

from moe_core.errors import (
    AccessError,
    AuthenticationError,
    EpserveError,
    ProtocolError,
    RequestError,
    UnavailableError,
)
from moe_core.service.registration import Registration

log = structlog.get_logger(__name__)

RETRY_S = 0.5
ATTEMPT_TIMEOUT_S = 5.0  # where there is another gateway to ask
REJOIN_RETRIES_S = (0.1, 2.0)  # the first pause, and the longest that it doubles to
FINAL = (RequestError, AccessError, AuthenticationError, ProtocolError)

Attempt = Callable[[str], Awaitable[Registration]]
"""Registers at one address. Raises UnavailableError, or the gateway's own refusal."""


class Gateways:
    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = deque(addresses)

    @property
    def current(self) -> str:
        """The address that has registered the worker last, or is asked next."""
        return self._addresses[0]

    async def register(self, attempt: Attempt, timeout_s: float) -> Registration:
        """The first registration. Raises UnavailableError when no gateway came in time, and at once
        a refusal."""
        deadline = time.monotonic() + timeout_s
        noted = False
        while True:
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    return await self._ask_each(attempt)
            except UnavailableError as error:
                reason = str(error)
                if deadline - time.monotonic() < RETRY_S:
                    raise
            except TimeoutError:
                raise UnavailableError(
                    f"no gateway answered at {', '.join(self._addresses)} within {timeout_s:g} s"
                ) from None
            if not noted:
                log.info("waiting for the gateway", address=list(self._addresses), reason=reason)
                noted = True
            await asyncio.sleep(RETRY_S)

    async def register_again(self, attempt: Attempt, timeout_s: float, reason: str) -> Registration:
        """After a registration has ended for `reason`; who has ended it is asked last. Raises
        UnavailableError when no gateway was there in time, or one has refused."""
        self._addresses.rotate(-1)
        pause_s, longest_s = REJOIN_RETRIES_S
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        return await self._ask_each(attempt)
                    except FINAL as error:
                        raise UnavailableError(f"lost its place in the cluster: {error}") from None
                    except EpserveError as error:
                        reason = str(error)
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, longest_s)
        except TimeoutError:
            raise UnavailableError(
                f"lost its gateway, and none took it back within {timeout_s:g} s: {reason}"
            ) from None

    async def _ask_each(self, attempt: Attempt) -> Registration:
        """Once, and remember which has taken the worker. Raises what the last of them has answered,
        or a refusal at once."""
        several = len(self._addresses) > 1
        reason = UnavailableError("no gateway was asked")
        for _ in tuple(self._addresses):
            try:
                async with asyncio.timeout(ATTEMPT_TIMEOUT_S if several else None):
                    return await attempt(self.current)
            except UnavailableError as error:
                reason = error
            except TimeoutError:
                reason = UnavailableError(
                    f"gateway {self.current}: no answer within {ATTEMPT_TIMEOUT_S:g} s"
                )
            self._addresses.rotate(-1)
        raise reason
