"""The layout in force, as it is written in the shared registry.

Knows one key, and what this gateway has read and written there. Knows not who leads, nor what is to
be in force.

Invariant: a layout is written in one transaction with the proof that this gateway's leadership
has not ended, and that nobody has written since this gateway read.
"""

from dataclasses import dataclass

from gateway.etcd_store import Item, Store
from gateway.presence import LEADER
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import RequestError
from moe_core.placement import ExpertPlacement
from moe_core.service.shared_records import SharedLayout

LAYOUT = "layout"


@dataclass(frozen=True, slots=True)
class Written:
    """What was found; `by_this`: this gateway has written it."""

    layout: SharedLayout
    revision: int
    by_this: bool


class LayoutRecord:
    """last_epoch: of the last layout that was taken up or written."""

    def __init__(self, store: Store, fingerprint: str) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._revision = 0
        self._pending = b""
        self.last_epoch = 0

    async def read(self) -> Written | None:
        """Raises RequestError for another model's, UnavailableError as all of this class."""
        item = await self._item()
        if item is None:
            return None
        layout = SharedLayout.decode(item.value)
        if layout.fingerprint != self._fingerprint:
            raise RequestError(
                f"model_fingerprint={self._fingerprint}: the registry belongs to gateways of the "
                f"model {layout.fingerprint}; start all with the same --model, or give this "
                "cluster a name of its own (etcd://HOST:PORT/NAME)"
            )
        by_this = item.modified == self._revision or item.value == self._pending
        return Written(layout, item.modified, by_this)

    def take_up(self, written: Written | None) -> None:
        """What is written from now on follows this."""
        self._revision = 0 if written is None else written.revision
        if written is not None:
            self.last_epoch = written.layout.last_epoch

    async def write(
        self, placement: ExpertPlacement, parallel: ParallelConfig, last_epoch: int, term: int
    ) -> bool:
        """False where the leadership that began at the revision `term` has ended, or another
        gateway has written; unless an earlier attempt has written just this."""
        layout = SharedLayout(placement, parallel, last_epoch, self._fingerprint)
        self._pending = layout.encode()
        revision = await self._store.write(
            LAYOUT,
            self._pending,
            created={LEADER: term},
            modified={LAYOUT: self._revision},
        )
        if revision is None:
            written = await self._item()
            if written is None or written.value != self._pending:
                return False
            revision = written.modified
        self._revision, self.last_epoch = revision, last_epoch
        return True

    async def _item(self) -> Item | None:
        return (await self._store.read(LAYOUT)).get(LAYOUT)
