"""Which of the gateways that share a registry leads.

Knows when to stand, to lead and to follow, from what the gateways have written there (presence.py,
layout_record.py). Knows no key and no worker; what a leader does with workers is the registry's
business (cluster.py), what a follower learns of them is following.py's.

Invariant: a gateway that cannot reach the registry goes on as it is, except that nothing is
written: members stay with who led them last.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import structlog

from gateway.cluster import Registry
from gateway.etcd_store import Store
from gateway.following import Following
from gateway.layout import Layout
from gateway.layout_record import LayoutRecord
from gateway.leadership import UndecidedError
from gateway.leases import CHECK_S
from gateway.presence import Presence
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import UnavailableError
from moe_core.placement import ExpertPlacement
from moe_core.service.certificates import ServerCheck
from moe_core.service.shared_records import GatewayRecord, SharedLayout

log = structlog.get_logger(__name__)

LOOK_S = 0.5


class Election:
    """`on_lost` is called when another gateway leads instead of this one."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        fingerprint: str,
        on_lost: Callable[[], None],
        security: ServerCheck | None = None,
    ) -> None:
        self._store = store
        self._registry = registry
        self._presence = Presence(store, registry)
        self._layout = LayoutRecord(store, fingerprint)
        self._on_lost = on_lost
        self._security = security
        self._leads = self._closed = False
        self._term = 0  # the revision at which this gateway came to lead
        self._following: Following | None = None
        self._trouble = ""
        self._turn = asyncio.Lock()

    @property
    def last_epoch(self) -> int:
        return self._layout.last_epoch

    @property
    def leads(self) -> bool:
        return self._leads

    def require(self, what: str) -> None:
        if self._leads:
            return
        if self._following is not None:
            leader = self._following.leader
            raise UnavailableError(
                f"{what} is for the leading gateway, {leader.name} "
                f"(for processes at {leader.cluster_address})"
            )
        raise UnavailableError(f"{what}: no gateway leads{self._trouble and '; '}{self._trouble}")

    async def run(self, cluster_address: str) -> None:
        """Until cancelled. `cluster_address`: where workers and other gateways reach this one.
        Raises RequestError where the registry belongs to another model."""
        self._presence.cluster_address = cluster_address
        self._show()
        checking = asyncio.create_task(self._check_adopted(), name="check adopted")
        try:
            while not self._closed:
                await self._look_once()
                await asyncio.sleep(LOOK_S)
        finally:
            checking.cancel()

    async def close(self) -> None:
        """Leave; another gateway may lead at once."""
        async with self._turn:
            self._closed, self._leads = True, False
            if self._following is not None:
                await self._following.close()
            with suppress(UnavailableError):
                await self._presence.leave()
            await self._store.close()

    async def publish(
        self, placement: ExpertPlacement, parallel: ParallelConfig, last_epoch: int
    ) -> None:
        async with self._turn:
            self.require("changing the cluster")
            await self._publish(placement, parallel, last_epoch)

    async def _publish(
        self, placement: ExpertPlacement, parallel: ParallelConfig, last_epoch: int
    ) -> None:
        try:
            if not await self._layout.write(placement, parallel, last_epoch, self._term):
                await self._explain_refusal()
        except UnavailableError as error:
            raise UndecidedError(str(error)) from None

    async def _explain_refusal(self) -> None:
        """Raises UnavailableError: another gateway leads, or this one's leadership has to be
        renewed first."""
        leader = await self._presence.leader()
        if leader is not None and not self._presence.is_own(leader):
            await self._stop_leading(GatewayRecord.decode(leader.value))
            self.require("changing the cluster")
        raise UndecidedError("this gateway's leadership has lapsed and is being renewed")

    async def _look_once(self) -> None:
        try:
            async with self._turn:
                if not self._closed:
                    await self._look()
            self._note_trouble("")
        except UnavailableError as error:
            self._note_trouble(str(error))
        self._show()

    async def _look(self) -> None:
        leader = await self._presence.renew()
        self._show()
        if leader is None:
            if self._may_stand():
                await self._stand()
        elif self._presence.is_own(leader):
            await self._lead(leader.created)
        else:
            await self._follow(GatewayRecord.decode(leader.value))

    def _may_stand(self) -> bool:
        """Who led goes on, and who hears a leader does not take its place."""
        return self._leads or self._following is None or not self._following.is_heard

    async def _stand(self) -> None:
        term = await self._presence.stand()
        if term is not None:
            await self._lead(term)

    async def _lead(self, term: int) -> None:
        if self._leads and term == self._term:
            return
        written = await self._layout.read()
        if self._leads and written is not None and not written.by_this:
            self._end_leading()  # another gateway has led meanwhile
        self._term = term
        self._layout.take_up(written)
        if not self._leads:
            await self._begin_leading(None if written is None else written.layout)
        if written is None:
            state = self._registry.state
            last_epoch = max(self.last_epoch, state.placement.epoch)
            await self._publish(state.placement, state.parallel, last_epoch)

    async def _begin_leading(self, written: SharedLayout | None) -> None:
        if self._following is not None:
            await self._following.close()
        self._following, self._leads = None, True
        layout = None
        if written is not None:
            layout = Layout(written.parallel, written.placement, told=True, settled=True)
        if layout is not None and layout.parallel != self._registry.parallel:
            log.warning(
                "the registry's sizes are in force, not this gateway's; epserve scale changes "
                "them, another name in the registry (etcd://HOST:PORT/NAME) begins anew",
                attn_devices=layout.parallel.attn_devices,
                expert_devices=layout.parallel.expert_devices,
            )
        self._registry.lead(layout)
        log.info("leads", rank=self._presence.rank, epoch=self._registry.state.placement.epoch)

    async def _follow(self, leader: GatewayRecord) -> None:
        if self._leads:
            await self._stop_leading(leader)
        known = self._following
        epoch = leader.member.instance_epoch
        if known is not None and known.leader.member.instance_epoch == epoch:
            return
        if known is not None:
            await known.close()
        await self._layout.read()  # it may be another model's
        self._listen_to(leader)

    async def _stop_leading(self, leader: GatewayRecord) -> None:
        self._end_leading()
        self._listen_to(leader)

    def _end_leading(self) -> None:
        self._leads = False
        self._registry.stop_leading()
        self._on_lost()

    def _listen_to(self, leader: GatewayRecord) -> None:
        log.info("follows", leader=leader.name)
        own_address = self._registry.gateway.address
        self._following = Following(leader, own_address, self._registry, self._security)

    async def _check_adopted(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            self._registry.check_adopted()

    def _note_trouble(self, words: str) -> None:
        if bool(words) != bool(self._trouble):
            log.warning("registry", state=words or "reached again")
        self._trouble = words

    def _show(self) -> None:
        standing = "no gateway leads"
        if self._leads:
            standing = "leads"
        elif self._following is not None:
            standing = f"follows gateway {self._following.leader.member.rank}"
        trouble = "the registry is unreachable" if self._trouble else ""
        words = "; ".join(filter(None, (standing, trouble)))
        self._registry.set_gateways(self._presence.rank, self._presence.others, words)
