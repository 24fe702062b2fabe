"""The shared registry's keys and values: the seam that gateways use, and etcd behind it.

Knows etcd's leases and transactions, and which address answered last. Knows no gateway and not
what is in a value.

Every write names what must still be so, so one that is repeated after a lost answer does nothing.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from moe_core.errors import ConfigError, UnavailableError
from moe_core.service.addresses import split_address
from moe_core.service.binding import is_loopback
from moe_core.service.grpc_channel import MAX_MESSAGE_BYTES, RECONNECT_OPTIONS, size_options

EMBEDDED = "embedded"
SCHEME = "etcd://"
DEFAULT_NAME = "default"
CALL_TIMEOUT_S = 1.0
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class EtcdAddress:
    """`name`: of the cluster, since several may share one etcd."""

    addresses: tuple[str, ...]
    name: str = DEFAULT_NAME

    def __str__(self) -> str:
        return f"{SCHEME}{','.join(self.addresses)}/{self.name}"


def parse_registry(text: str, insecure: bool) -> EtcdAddress | None:
    """None for the embedded registry. Raises ConfigError naming what may be given."""
    if text == EMBEDDED:
        return None
    nearest = (EMBEDDED, "etcd://127.0.0.1:2379")
    if not text.startswith(SCHEME):
        raise ConfigError("registry", text, "must be embedded or etcd://HOST:PORT[,…]", nearest)
    listed, _, name = text.removeprefix(SCHEME).partition("/")
    addresses = tuple(listed.split(","))
    for address in addresses:
        host, _ = split_address("registry", address)
        if not (insecure or is_loopback(host)):
            rule = (
                "etcd is reached without TLS, and whoever can write there may change the cluster; "
                "reach it through a proxy on this machine that speaks TLS, or say --insecure"
            )
            raise ConfigError("registry", text, rule, nearest)
    if "/" in name:
        raise ConfigError("registry", text, "the cluster's name holds no /", nearest)
    return EtcdAddress(addresses, name or DEFAULT_NAME)


@dataclass(frozen=True, slots=True)
class Item:
    """created, modified: the registry's revisions at which the key came, and last changed."""

    value: bytes
    created: int
    modified: int


class Store(Protocol):
    """Each method raises UnavailableError where the registry does not answer in time."""

    async def grant(self, ttl_s: int) -> int:
        """A new lease, which ends by itself ttl_s after it was last refreshed."""

    async def refresh(self, lease: int) -> bool:
        """False once the lease has ended; its keys are gone then."""

    async def revoke(self, lease: int) -> None: ...

    async def read(self, prefix: str) -> dict[str, Item]: ...

    async def write(
        self,
        key: str,
        value: bytes,
        *,
        created: Mapping[str, int],
        modified: Mapping[str, int] | None = None,
        lease: int | None = None,
    ) -> int | None:
        """Write, in one transaction, if each key of `created` and of `modified` has that revision
        (0: is not there). Returns the write's revision, None where it was not so."""

    async def close(self) -> None: ...


class EtcdStore:
    """Asks the address that answered last, and the others where it does not."""

    def __init__(self, where: EtcdAddress) -> None:
        """Raises ConfigError where aetcd is not installed."""
        try:
            import aetcd
        except ImportError:
            rule = "needs the package aetcd: pip install 'epserve[etcd]'"
            raise ConfigError("registry", str(where), rule, (EMBEDDED,)) from None
        self._library: Any = aetcd
        self._prefix = f"/epserve/{where.name}/"
        options = dict((*RECONNECT_OPTIONS, *size_options(MAX_MESSAGE_BYTES)))
        pairs = [split_address("registry", address) for address in where.addresses]
        self._clients: deque[Any] = deque(
            aetcd.Client(host=f"[{host}]" if ":" in host else host, port=port, options=options)
            for host, port in pairs
        )

    async def grant(self, ttl_s: int) -> int:
        lease = await self._ask(lambda client: client.lease(ttl_s))
        return int(lease.id)

    async def refresh(self, lease: int) -> bool:
        answer = await self._ask(lambda client: client.refresh_lease(lease))
        return answer is not None and answer.TTL > 0

    async def revoke(self, lease: int) -> None:
        await self._ask(lambda client: client.revoke_lease(lease))

    async def read(self, prefix: str) -> dict[str, Item]:
        found = await self._ask(lambda client: client.get_prefix(self._key(prefix)))
        return {
            each.key.decode().removeprefix(self._prefix): Item(
                each.value, each.create_revision, each.mod_revision
            )
            for each in found
        }

    async def write(
        self,
        key: str,
        value: bytes,
        *,
        created: Mapping[str, int],
        modified: Mapping[str, int] | None = None,
        lease: int | None = None,
    ) -> int | None:
        of = self._library.transactions
        compare = [of.Create(self._key(each)) == at for each, at in created.items()]
        compare += [of.Mod(self._key(each)) == at for each, at in (modified or {}).items()]
        put = [of.Put(self._key(key), value, lease)]
        done, answers = await self._ask(lambda client: client.transaction(compare, put, []))
        return int(answers[0].response_put.header.revision) if done else None

    async def close(self) -> None:
        for client in self._clients:
            await client.close()

    def _key(self, key: str) -> bytes:
        return (self._prefix + key).encode()

    async def _ask(self, question: Callable[[Any], Awaitable[_Answer]]) -> _Answer:
        reasons = []
        for _ in range(len(self._clients)):
            client = self._clients[0]
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    return await question(client)
            except TimeoutError:
                reasons.append(f"no answer within {CALL_TIMEOUT_S:g} s")
            except self._library.exceptions.ClientError as error:
                reasons.append(str(error))
            self._clients.rotate(-1)
        raise UnavailableError(f"the registry cannot be reached: {'; '.join(reasons)}")
