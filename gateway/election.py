"""Which of the gateways that share a registry leads, and what they have written there.

Knows the keys: each gateway's own record and the leader's, which go when their lease ends, and the
layout in force. Knows no worker; what a leader does with them is the registry's business
(cluster.py), what a follower learns of them is following.py's.

Invariants: a layout is written in one transaction with the proof that this gateway's leadership
has not ended, and that nobody has written since this gateway read. A gateway that cannot reach the
registry goes on as it is, except that nothing is written: members stay with who led them last.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress

import structlog

from gateway.cluster import Registry
from gateway.etcd_store import Item, Store
from gateway.following import Following
from gateway.layout import Layout
from gateway.leadership import UndecidedError
from gateway.leases import CHECK_S
from moe_core.cluster import Member
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import RequestError, UnavailableError
from moe_core.placement import ExpertPlacement
from moe_core.service.certificates import ServerCheck
from moe_core.service.logs import bind_rank
from moe_core.service.shared_records import GatewayRecord, SharedLayout

log = structlog.get_logger(__name__)

LEASE_S = 3
LOOK_S = 0.5
LIVE, LEADER, GATEWAYS, LAYOUT = "live/", "live/leader", "live/gateway/", "layout"
MAX_GATEWAYS = 64


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
        self._fingerprint = fingerprint
        self._cluster_address = ""
        self._on_lost = on_lost
        self._security = security
        self._lease: int | None = None
        self._own: Item | None = None  # this gateway's record, as it was written last
        self._rank = 0
        self._others: tuple[Member, ...] = ()
        self._leads = self._closed = False
        self._term = 0  # the revision at which this gateway came to lead
        self._layout_revision = 0
        self._pending = b""
        self._following: Following | None = None
        self._trouble = ""
        self._turn = asyncio.Lock()
        self.last_epoch = 0

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
        self._cluster_address = cluster_address
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
            if self._lease is not None:
                with suppress(UnavailableError):
                    await self._store.revoke(self._lease)
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
        layout = SharedLayout(placement, parallel, last_epoch, self._fingerprint)
        self._pending = layout.encode()
        try:
            revision = await self._write_layout() or await self._revision_of_pending()
        except UnavailableError as error:
            raise UndecidedError(str(error)) from None
        self._layout_revision, self.last_epoch = revision, last_epoch

    async def _write_layout(self) -> int | None:
        return await self._store.write(
            LAYOUT,
            self._pending,
            created={LEADER: self._term},
            modified={LAYOUT: self._layout_revision},
        )

    async def _written_layout(self) -> Item | None:
        return (await self._store.read(LAYOUT)).get(LAYOUT)

    async def _revision_of_pending(self) -> int:
        """Of what an earlier attempt has written after all. Raises UnavailableError where another
        gateway leads, or this one's leadership has to be renewed first."""
        written = await self._written_layout()
        if written is not None and written.value == self._pending:
            return written.modified
        leader = (await self._store.read(LIVE)).get(LEADER)
        if leader is not None and not self._is_own(leader):
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
        if self._lease is None or not await self._store.refresh(self._lease):
            self._own = None
            self._lease = await self._store.grant(LEASE_S)
        live = await self._store.read(LIVE)
        await self._write_own(live)
        self._note_others(live)
        leader = live.get(LEADER)
        if leader is None:
            if self._may_stand():
                await self._stand()
        elif self._is_own(leader):
            await self._lead(leader.created)
        else:
            await self._follow(GatewayRecord.decode(leader.value))

    def _record(self) -> GatewayRecord:
        return GatewayRecord(self._registry.gateway, self._cluster_address)

    def _is_own(self, item: Item) -> bool:
        epoch = GatewayRecord.decode(item.value).member.instance_epoch
        return epoch == self._registry.gateway.instance_epoch

    async def _write_own(self, live: Mapping[str, Item]) -> None:
        """Under the lowest free rank, which is this gateway's until its lease ends."""
        value = self._record().encode()
        if self._own is not None and self._own.value == value:
            return
        if self._own is None:
            taken = {int(key.removeprefix(GATEWAYS)) for key in live if key.startswith(GATEWAYS)}
            mine = [key for key, item in live.items() if key != LEADER and self._is_own(item)]
            free = [rank for rank in range(MAX_GATEWAYS) if rank not in taken]
            self._rank = int(mine[0].removeprefix(GATEWAYS)) if mine else free[0]
            created = live[mine[0]].created if mine else 0
            bind_rank(self._rank)
            self._show()
            value = self._record().encode()
        else:
            created = self._own.created
        key = f"{GATEWAYS}{self._rank}"
        revision = await self._store.write(key, value, created={key: created}, lease=self._lease)
        # Where another gateway was faster, the next look finds another rank.
        self._own = None if revision is None else Item(value, created or revision, revision)

    def _note_others(self, live: Mapping[str, Item]) -> None:
        records = [item for key, item in sorted(live.items()) if key.startswith(GATEWAYS)]
        others = (GatewayRecord.decode(item.value) for item in records if not self._is_own(item))
        self._others = tuple(record.member for record in others)

    def _may_stand(self) -> bool:
        """Who led goes on, and who hears a leader does not take its place."""
        return self._leads or self._following is None or not self._following.is_heard

    async def _stand(self) -> None:
        term = await self._store.write(
            LEADER, self._record().encode(), created={LEADER: 0}, lease=self._lease
        )
        if term is not None:
            await self._lead(term)

    async def _lead(self, term: int) -> None:
        if self._leads and term == self._term:
            return
        written = await self._written_layout()
        layout = None if written is None else self._checked(SharedLayout.decode(written.value))
        if self._leads and written is not None and not self._has_written(written):
            self._end_leading()  # another gateway has led meanwhile
        self._term = term
        self._layout_revision = 0 if written is None else written.modified
        if layout is not None:
            self.last_epoch = layout.last_epoch
        if not self._leads:
            if self._following is not None:
                await self._following.close()
            self._following, self._leads = None, True
            if layout is not None and layout.parallel != self._registry.parallel:
                log.warning(
                    "the registry's sizes are in force, not this gateway's; epserve scale changes "
                    "them, another name in the registry (etcd://HOST:PORT/NAME) begins anew",
                    attn_devices=layout.parallel.attn_devices,
                    expert_devices=layout.parallel.expert_devices,
                )
            self._registry.lead(
                None
                if layout is None
                else Layout(layout.parallel, layout.placement, told=True, settled=True)
            )
            log.info("leads", rank=self._rank, epoch=self._registry.state.placement.epoch)
        if layout is None:
            state = self._registry.state
            last_epoch = max(self.last_epoch, state.placement.epoch)
            await self._publish(state.placement, state.parallel, last_epoch)

    def _has_written(self, item: Item) -> bool:
        return item.modified == self._layout_revision or item.value == self._pending

    async def _follow(self, leader: GatewayRecord) -> None:
        if self._leads:
            await self._stop_leading(leader)
        known = self._following
        epoch = leader.member.instance_epoch
        if known is not None and known.leader.member.instance_epoch == epoch:
            return
        if known is not None:
            await known.close()
        written = await self._written_layout()
        if written is not None:
            self._checked(SharedLayout.decode(written.value))
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

    def _checked(self, layout: SharedLayout) -> SharedLayout:
        if layout.fingerprint != self._fingerprint:
            raise RequestError(
                f"model_fingerprint={self._fingerprint}: the registry belongs to gateways of the "
                f"model {layout.fingerprint}; start all with the same --model, or give this "
                "cluster a name of its own (etcd://HOST:PORT/NAME)"
            )
        return layout

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
        self._registry.set_gateways(self._rank, self._others, words)
