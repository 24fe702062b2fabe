"""A worker's place in the cluster: join, report, and know who else is there.

Knows registrations (registration.py) one after the other; which gateway is asked for the next, and
for how long, gateways.py knows. Knows nothing of what the worker does; whether the cluster is as it
needs it is a predicate of the caller's.

A worker outlives its gateway. When a registration ends (the gateway was restarted, or has taken
this process for dead) the worker registers again, as the same start of the same process, and says
what it knows of the cluster. Meanwhile `state` stays as it was. The membership is `lost` when no
gateway takes the worker back in time, or one refuses to.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import structlog

from moe_core.cluster import (
    AttentionLoad,
    ClusterState,
    EngineMetrics,
    ExpertLoad,
    Join,
    LinkStats,
    MemberState,
    Role,
    StatusReport,
)
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import EpserveError, UnavailableError
from moe_core.service.certificates import Certificates, ServerCheck, expecting
from moe_core.service.gateways import FINAL, Gateways
from moe_core.service.peer_roles import PeerRole
from moe_core.service.registration import Outbox, Registration

log = structlog.get_logger(__name__)

__all__ = ["REJOIN_TIMEOUT_S", "Join", "Membership"]

REJOIN_TIMEOUT_S = 600.0


class Membership:
    """A place in the cluster, from `join` until `close` or until `lost` raises."""

    def __init__(
        self, gateways: Sequence[str], security: ServerCheck | None, rejoin_timeout_s: float
    ) -> None:
        self._gateways = Gateways(gateways)
        self._security = security
        self._rejoin_timeout_s = rejoin_timeout_s
        self._changed = asyncio.Condition()
        self._status: StatusReport | None = None
        self._load: ExpertLoad | None = None
        self._outbox = Outbox(None, None)
        self._error: EpserveError | None = None
        self._state: ClusterState | None = None
        self._registration: Registration
        self._staying: asyncio.Task[None] | None = None
        self.rank = -1
        self.parallel = ParallelConfig()

    @classmethod
    async def join(
        cls,
        gateway_address: str,
        join: Join,
        *,
        timeout_s: float,
        tls: Certificates | None = None,
        rejoin_timeout_s: float = REJOIN_TIMEOUT_S,
    ) -> "Membership":
        """Join the cluster of the gateway at `gateway_address` (host:port, or several with commas
        between them, of gateways that share a registry), waiting up to
        `timeout_s` for a gateway that is not there yet, and later up to `rejoin_timeout_s` for
        one that is gone. When this returns, `rank`, `parallel` and `state` are known. Raises
        UnavailableError when no gateway came in time, and at once the gateway's own refusal (of a
        rank, a fingerprint, a dtype)."""
        gateways = gateway_address.split(",")
        membership = cls(gateways, expecting(tls, PeerRole.GATEWAY), rejoin_timeout_s)
        first = partial(membership._register, join)
        membership._registration = await membership._gateways.register(first, timeout_s)
        staying = membership._stay(replace(join, rank=membership.rank))
        membership._staying = asyncio.create_task(staying, name="membership")
        return membership

    @property
    def state(self) -> ClusterState:
        """The latest that a gateway has sent."""
        assert self._state is not None, "join has not returned yet"
        return self._state

    def report(
        self,
        state: MemberState,
        *,
        detail: str = "",
        store_address: str = "",
        attention_load: AttentionLoad | None = None,
        links: Sequence[LinkStats] = (),
        engine_metrics: EngineMetrics | None = None,
        prepared_epoch: int | None = None,
        used_epoch: int | None = None,
        refused_epoch: int | None = None,
    ) -> None:
        """Tell the gateway, and so everybody, how this worker is. Replaces the last report; of
        several that wait to be sent only the newest is. Another gateway is told it again."""
        self._status = StatusReport(
            state,
            detail,
            store_address,
            attention_load,
            tuple(links),
            engine_metrics,
            prepared_epoch,
            used_epoch,
            refused_epoch,
        )
        self._outbox.put(self._status)

    def report_expert_load(self, load: ExpertLoad) -> None:
        """Tell the gateway, and nobody else, which experts this worker's tokens went to."""
        self._load = load
        self._outbox.put(load)

    async def wait_until(
        self, predicate: Callable[[ClusterState], bool], timeout_s: float, what: str
    ) -> ClusterState:
        """The first state that satisfies `predicate`. Raises UnavailableError after `timeout_s`,
        naming `what` was awaited and the ranks that are not ready, or when the membership is
        lost."""

        def settled() -> bool:
            return self._error is not None or predicate(self.state)

        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(settled)
        except TimeoutError:
            missing = [phrase for role in Role for phrase in self.state.missing(role)]
            raise UnavailableError(
                f"waited {timeout_s:g} s for {what}; not ready: {'; '.join(missing) or 'nobody'}"
            ) from None
        if self._error is not None:
            raise self._error
        return self.state

    async def next_state(self, seen: ClusterState) -> ClusterState:
        """The first that is another one than `seen`, however long that takes; ends as `lost`."""

        def settled() -> bool:
            return self._error is not None or self._state is not seen

        async with self._changed:
            await self._changed.wait_for(settled)
        if self._error is not None:
            raise self._error
        return self.state

    async def lost(self) -> None:
        """Waits until this worker is out of the cluster for good, and raises why."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._error is not None)
        assert self._error is not None
        raise self._error

    async def close(self) -> None:
        """Leave the cluster. The gateway, if there is one, removes this member at once."""
        if self._staying is not None:
            self._staying.cancel()
            with suppress(asyncio.CancelledError):
                await self._staying
            await self._registration.close()

    async def _register(self, join: Join, gateway: str) -> Registration:
        """The last reports are told again, since nobody may know them yet."""
        self._outbox = Outbox(self._status, self._load)
        registration = Registration(gateway, self._security, join, self._outbox)
        try:
            await registration.open()
            self.rank, self.parallel = registration.rank, registration.parallel
            await self._take(await registration.next_state())
        except BaseException:
            await registration.close()
            raise
        return registration

    async def _register_again(self, join: Join, gateway: str) -> Registration:
        """Telling what this worker knows of the cluster."""
        state = self.state
        told = replace(join, placement=state.placement, parallel=state.parallel)
        return await self._register(told, gateway)

    async def _stay(self, join: Join) -> None:
        """Until cancelled, or lost."""
        try:
            while True:
                reason = await self._until_it_ends(self._registration)
                gateways = self._gateways
                say = log.info if self._gateway_was_draining else log.warning
                say("the registration has ended", gateway=gateways.current, reason=reason)
                self._registration = await gateways.register_again(
                    partial(self._register_again, join), self._rejoin_timeout_s, reason
                )
                log.info("registered again", gateway=gateways.current, rank=self.rank)
        except EpserveError as error:
            async with self._changed:
                self._error = error
                self._changed.notify_all()

    @property
    def _gateway_was_draining(self) -> bool:
        return any(each.state is MemberState.DRAINING for each in self.state.tier(Role.GATEWAY))

    async def _until_it_ends(self, registration: Registration) -> str:
        """Why it has ended. Raises what registering again would not mend."""
        try:
            while True:
                await self._take(await registration.next_state())
        except FINAL:
            raise
        except EpserveError as error:
            return str(error)
        finally:
            await registration.close()

    async def _take(self, state: ClusterState) -> None:
        async with self._changed:
            self._state = state
            self._changed.notify_all()
