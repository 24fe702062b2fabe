"""The placements that this process's steps may use, by epoch.

Knows which placement is the newest and each one's tables for planning a dispatch. Knows neither
who holds what it places nor when a placement comes to be used: the engine gives every step the
newest epoch, and the step's key names it from there on.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from attn_service.replica_choice import ALL_USUAL, LayerTables, Standing
from moe_core.errors import ProtocolError
from moe_core.placement import ExpertPlacement

# Of tables for groups that stand differently; each is a few hundred microseconds' work.
MAX_STANDINGS = 8


class Placements:
    """Epochs ascend; one that may still be used is kept until `forget_before`."""

    def __init__(self, first: ExpertPlacement, device: torch.device) -> None:
        self._device = device
        self._by_epoch = {first.epoch: first}
        self._tables: dict[Standing, dict[tuple[int, int], LayerTables]] = {ALL_USUAL: {}}
        self._in_use: Counter[int] = Counter()
        self.newest = first

    def add(self, placement: ExpertPlacement) -> None:
        """Steps that are planned from now on use it. Without effect for one that is not newer."""
        if placement.epoch > self.newest.epoch:
            self._by_epoch[placement.epoch] = placement
            self.newest = placement

    def knows(self, epoch: int) -> bool:
        return epoch in self._by_epoch

    @contextmanager
    def in_use(self, epoch: int) -> Iterator[None]:
        """A step of this epoch is under way."""
        self._in_use[epoch] += 1
        try:
            yield
        finally:
            self._in_use[epoch] -= 1

    @property
    def oldest_in_use(self) -> int:
        """No step uses an older one, now or later."""
        return min(+self._in_use, default=self.newest.epoch)

    def at(self, epoch: int) -> ExpertPlacement:
        """Raises ProtocolError for an epoch that is not here."""
        found = self._by_epoch.get(epoch)
        if found is None:
            raise ProtocolError(
                f"placement epoch {epoch} is not known here; known are "
                f"{', '.join(map(str, sorted(self._by_epoch)))}"
            )
        return found

    def tables(self, epoch: int, layer_id: int, standing: Standing = ALL_USUAL) -> LayerTables:
        """One layer's tables, made when they are first asked for. Raises as `at`."""
        of_standing = self._tables.get(standing)
        if of_standing is None:
            of_standing = self._add_standing(standing)
        tables = of_standing.get((epoch, layer_id))
        if tables is None:
            placement = self.at(epoch)
            tables = LayerTables.build(
                placement.layer(layer_id), placement.ep_size, self._device, standing
            )
            of_standing[epoch, layer_id] = tables
        return tables

    def _add_standing(self, standing: Standing) -> dict[tuple[int, int], LayerTables]:
        """The oldest goes where there are too many; ALL_USUAL, the first of them, always stays."""
        if len(self._tables) > MAX_STANDINGS:
            oldest = next(each for each in self._tables if each != ALL_USUAL)
            del self._tables[oldest]
        return self._tables.setdefault(standing, {})

    def forget_before(self, epoch: int) -> None:
        """No step uses an older one any more. The newest always stays."""
        kept = min(epoch, self.newest.epoch)
        self._by_epoch = {e: p for e, p in self._by_epoch.items() if e >= kept}
        for tables in self._tables.values():
            for key in [key for key in tables if key[0] < kept]:
                del tables[key]
