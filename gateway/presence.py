"""That this gateway is there, as the others see it in the shared registry, and who else is.

Knows the lease, each gateway's own record and the leader's, which go when their lease ends. Knows
no layout, and not what follows from who leads: election.py does.
"""

from collections.abc import Mapping
from dataclasses import replace

from gateway.cluster import Registry
from gateway.etcd_store import Item, Store
from moe_core.cluster import Member
from moe_core.service.logs import bind_rank
from moe_core.service.shared_records import GatewayRecord

LEASE_S = 3
LIVE, LEADER, GATEWAYS = "live/", "live/leader", "live/gateway/"
MAX_GATEWAYS = 64


class Presence:
    """cluster_address: where workers and other gateways reach this one, to be set before `renew`.
    `rank` and `others` are as the last `renew` has found them."""

    def __init__(self, store: Store, registry: Registry) -> None:
        self._store = store
        self._registry = registry
        self._lease: int | None = None
        self._own: Item | None = None  # this gateway's record, as it was written last
        self.cluster_address = ""
        self.rank = 0
        self.others: tuple[Member, ...] = ()

    async def renew(self) -> Item | None:
        """Stay there, and look who is; the leader's record. Raises UnavailableError, as all of
        this class."""
        if self._lease is None or not await self._store.refresh(self._lease):
            self._own = None
            self._lease = await self._store.grant(LEASE_S)
        live = await self._store.read(LIVE)
        await self._write_own(live)
        records = [item for key, item in sorted(live.items()) if key.startswith(GATEWAYS)]
        others = (GatewayRecord.decode(item.value) for item in records if not self.is_own(item))
        self.others = tuple(record.member for record in others)
        return live.get(LEADER)

    async def leader(self) -> Item | None:
        """The leader's record, as it is now."""
        return (await self._store.read(LIVE)).get(LEADER)

    async def stand(self) -> int | None:
        """Become the leader, where there is none: the revision at which, or None."""
        return await self._store.write(
            LEADER, self._record().encode(), created={LEADER: 0}, lease=self._lease
        )

    async def leave(self) -> None:
        if self._lease is not None:
            await self._store.revoke(self._lease)

    def is_own(self, item: Item) -> bool:
        """Whether this gateway has written the record."""
        epoch = GatewayRecord.decode(item.value).member.instance_epoch
        return epoch == self._registry.gateway.instance_epoch

    def _record(self) -> GatewayRecord:
        return GatewayRecord(replace(self._registry.gateway, rank=self.rank), self.cluster_address)

    async def _write_own(self, live: Mapping[str, Item]) -> None:
        """Under the lowest free rank, which is this gateway's until its lease ends."""
        value = self._record().encode()
        if self._own is not None and self._own.value == value:
            return
        if self._own is None:
            created = self._take_rank(live)
            value = self._record().encode()
        else:
            created = self._own.created
        key = f"{GATEWAYS}{self.rank}"
        revision = await self._store.write(key, value, created={key: created}, lease=self._lease)
        # Where another gateway was faster, the next look finds another rank.
        self._own = None if revision is None else Item(value, created or revision, revision)

    def _take_rank(self, live: Mapping[str, Item]) -> int:
        """The revision at which its key came, 0 if it has yet to come."""
        taken = {int(key.removeprefix(GATEWAYS)) for key in live if key.startswith(GATEWAYS)}
        mine = [key for key, item in live.items() if key != LEADER and self.is_own(item)]
        free = [rank for rank in range(MAX_GATEWAYS) if rank not in taken]
        self.rank = int(mine[0].removeprefix(GATEWAYS)) if mine else free[0]
        bind_rank(self.rank)
        return live[mine[0]].created if mine else 0
