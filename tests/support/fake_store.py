"""etcd's keys, leases and transactions in memory, seen by several gateways.

Knows what gateway.etcd_store.Store promises. Time stands still: a test ends leases itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.etcd_store import Item
from moe_core.errors import UnavailableError


@dataclass
class FakeEtcd:
    """What all see."""

    items: dict[str, Item] = field(default_factory=dict)
    lease_of: dict[str, int] = field(default_factory=dict)
    leases: set[int] = field(default_factory=set)
    revision: int = 1
    layouts: list[bytes] = field(default_factory=list)  # all that were ever written

    def expire(self, lease: int | None) -> None:
        """A lease ends."""
        self.leases.discard(-1 if lease is None else lease)
        for key in [key for key, its in self.lease_of.items() if its == lease]:
            del self.items[key], self.lease_of[key]


class FakeStore:
    """One gateway's way to it. `reachable`: whether it answers; `loses_answers`: it does what is
    asked, and nobody hears of it."""

    def __init__(self, etcd: FakeEtcd) -> None:
        self.etcd = etcd
        self.reachable = True
        self.loses_answers = False

    async def grant(self, ttl_s: int) -> int:
        self._reach()
        self.etcd.revision += 1
        self.etcd.leases.add(self.etcd.revision)
        return self.etcd.revision

    async def refresh(self, lease: int) -> bool:
        self._reach()
        return lease in self.etcd.leases

    async def revoke(self, lease: int) -> None:
        self._reach()
        self.etcd.expire(lease)

    async def read(self, prefix: str) -> dict[str, Item]:
        self._reach()
        return {key: item for key, item in self.etcd.items.items() if key.startswith(prefix)}

    async def write(
        self,
        key: str,
        value: bytes,
        *,
        created: Mapping[str, int],
        modified: Mapping[str, int] | None = None,
        lease: int | None = None,
    ) -> int | None:
        self._reach()
        revision = self._write(key, value, created, modified or {}, lease)
        if self.loses_answers:
            raise UnavailableError("the answer was lost")
        return revision

    async def close(self) -> None:
        pass

    def _reach(self) -> None:
        if not self.reachable:
            raise UnavailableError("the registry cannot be reached: no answer")

    def _write(
        self,
        key: str,
        value: bytes,
        created: Mapping[str, int],
        modified: Mapping[str, int],
        lease: int | None,
    ) -> int | None:
        items, none = self.etcd.items, Item(b"", 0, 0)
        if any(items.get(each, none).created != at for each, at in created.items()):
            return None
        if any(items.get(each, none).modified != at for each, at in modified.items()):
            return None
        if lease is not None and lease not in self.etcd.leases:
            raise UnavailableError("requested lease not found")
        self.etcd.revision += 1
        came = items[key].created if key in items else self.etcd.revision
        items[key] = Item(value, came, self.etcd.revision)
        if lease is not None:
            self.etcd.lease_of[key] = lease
        if key == "layout":
            self.etcd.layouts.append(value)
        return self.etcd.revision
