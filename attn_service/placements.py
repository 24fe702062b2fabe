"""The placements that this process's steps may use, by epoch.

Knows which placement is the newest and each one's tables for planning a dispatch. Knows neither
who holds what it places nor when a placement comes to be used: the engine gives every step the
newest epoch, and the step's key names it from there on.
"""

import torch

from attn_service.dispatch_plan import LayerTables
from moe_core.errors import ProtocolError
from moe_core.placement import ExpertPlacement


class Placements:
    """Epochs ascend; one that may still be used is kept until `forget_before`."""

    def __init__(self, first: ExpertPlacement, device: torch.device) -> None:
        self._device = device
        self._by_epoch = {first.epoch: first}
        self._tables: dict[tuple[int, int], LayerTables] = {}
        self.newest = first

    def add(self, placement: ExpertPlacement) -> None:
        """Steps that are planned from now on use it. Without effect for one that is not newer."""
        if placement.epoch > self.newest.epoch:
            self._by_epoch[placement.epoch] = placement
            self.newest = placement

    def at(self, epoch: int) -> ExpertPlacement:
        """Raises ProtocolError for an epoch that is not here."""
        found = self._by_epoch.get(epoch)
        if found is None:
            raise ProtocolError(
                f"placement epoch {epoch} is not known here; known are "
                f"{', '.join(map(str, sorted(self._by_epoch)))}"
            )
        return found

    def tables(self, epoch: int, layer_id: int) -> LayerTables:
        """One layer's tables, made when they are first asked for. Raises as `at`."""
        tables = self._tables.get((epoch, layer_id))
        if tables is None:
            placement = self.at(epoch)
            tables = LayerTables.build(placement.layer(layer_id), placement.ep_size, self._device)
            self._tables[epoch, layer_id] = tables
        return tables

    def forget_before(self, epoch: int) -> None:
        """No step uses an older one any more. The newest always stays."""
        kept = min(epoch, self.newest.epoch)
        self._by_epoch = {e: p for e, p in self._by_epoch.items() if e >= kept}
        self._tables = {key: t for key, t in self._tables.items() if key[0] >= kept}
