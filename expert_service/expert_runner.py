"""From physical ids to partial sums: this process's experts, under every placement it serves.

Knows the placements that are served, by epoch, this process's EP rank, and which expert a physical
id is in each. Knows no transport's memory, no queue and no peer, nor where weights come from.

Invariant: all that a served placement gives to this EP rank is held.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from expert_service.expert_store import ExpertStore
from moe_core.errors import ProtocolError
from moe_core.model.experts import NO_EXPERT, run_experts
from moe_core.model.weights import ExpertLayerWeights, ExpertWeights
from moe_core.placement import ExpertPlacement, LayerPlacement

_NOT_HELD = -2
_MAX_IDS_IN_ERRORS = 16


class ExpertRunner:
    """Runs one EP rank's experts (one TP shard of them) of every MoE layer.

    weights: by layer id, the experts of `placement` in slot order; all on `device`. An `ep_rank`
    beyond the placement's ep_size begins with none.
    """

    def __init__(
        self,
        weights: Mapping[int, ExpertLayerWeights],
        placement: ExpertPlacement,
        ep_rank: int,
        device: torch.device,
    ) -> None:
        shared = {layer_id: layer.shared for layer_id, layer in weights.items()}
        self._store = ExpertStore(placement.num_logical_experts, shared)
        self._ep_rank = ep_rank
        self._device = device
        self._served: dict[int, ExpertPlacement] = {}
        self._tables: dict[int, dict[int, Tensor]] = {}  # by epoch, then layer id
        for layer in placement.layers:
            self._put_all(layer, weights[layer.layer_id])
        self.serve(placement)

    def _put_all(self, layer: LayerPlacement, weights: ExpertLayerWeights) -> None:
        placed = layer.logical_experts(self._ep_rank)
        if len(weights.w13) != len(placed):
            raise ValueError(
                f"layer {layer.layer_id}: {len(weights.w13)} experts loaded, {len(placed)} placed"
            )
        for logical, w13, w2 in zip(placed, weights.w13, weights.w2, strict=True):
            assert w13 is not None
            assert w2 is not None
            self.put(layer.layer_id, logical, ExpertWeights(w13, w2))

    @property
    def served(self) -> tuple[ExpertPlacement, ...]:
        """The placements that are served, by ascending epoch."""
        return tuple(self._served[epoch] for epoch in sorted(self._served))

    @property
    def num_experts(self) -> int:
        """Routed experts held, over all layers."""
        return self._store.num_experts

    def expert(self, layer_id: int, logical: int) -> ExpertWeights | None:
        """None where it is not held."""
        return self._store.expert(layer_id, logical)

    def placed(self, placement: ExpertPlacement) -> tuple[tuple[int, int], ...]:
        """The (layer id, logical expert) pairs that a placement gives to this EP rank."""
        return tuple(
            (layer.layer_id, logical)
            for layer in placement.layers
            for logical in layer.logical_experts(self._ep_rank)
        )

    def lacking(self, placement: ExpertPlacement) -> tuple[tuple[int, int], ...]:
        """Those of them that must be put before it can be served."""
        return tuple(pair for pair in self.placed(placement) if self._store.expert(*pair) is None)

    def put(self, layer_id: int, logical: int, weights: ExpertWeights) -> None:
        """Hold one more expert."""
        self._store.put(layer_id, logical, weights)

    def serve(self, placement: ExpertPlacement) -> None:
        """Serve its epoch too, instead of what had that epoch. Raises ValueError where an expert
        of it is lacking."""
        lacking = self.lacking(placement)
        if lacking:
            raise ValueError(f"placement epoch {placement.epoch}: {len(lacking)} experts lack")
        like = self.served[-1] if self._served else None
        known = {} if like is None else self._tables[like.epoch]
        self._tables[placement.epoch] = {
            layer.layer_id: known[layer.layer_id]
            if like is not None and _same(like, placement, layer)
            else self._table(layer, placement.ep_size)
            for layer in placement.layers
        }
        self._served[placement.epoch] = placement

    def retain(self, placements: Collection[ExpertPlacement]) -> int:
        """Serve no other placement than `placements`, and hold no expert that none of them needs;
        those of them that are not served yet may lack experts. Says how many were dropped."""
        for old in self.served:
            if old not in placements:
                del self._served[old.epoch], self._tables[old.epoch]
        return sum(
            self._store.drop_others(layer_id, self._needed(layer_id, placements))
            for layer_id in self._store.layers
        )

    def _needed(self, layer_id: int, placements: Collection[ExpertPlacement]) -> set[int]:
        return {
            logical
            for placement in placements
            for logical in placement.layer(layer_id).logical_experts(self._ep_rank)
        }

    def _table(self, layer: LayerPlacement, ep_size: int) -> Tensor:
        """[2 + num_physical + ep_size + 1] int64: local ids by physical id + 2."""
        table = torch.full((2 + layer.num_physical + ep_size + 1,), _NOT_HELD, dtype=torch.int64)
        table[1] = NO_EXPERT
        for physical in layer.physical_experts(self._ep_rank):
            table[2 + physical] = layer.physical_to_logical[physical]
        weights = self._store.layers[layer.layer_id]
        if weights.shared is not None and self._ep_rank < ep_size:
            table[2 + layer.shared_physical_id(self._ep_rank)] = len(weights.w13)
        return table

    def local_ids(self, placement_epoch: int, layer_id: int, physical_ids: Tensor) -> Tensor:
        """[num_tokens, num_columns] int64: places in this process's weights, or NO_EXPERT. They
        stay right until `retain` drops what they name.

        Raises ProtocolError for an epoch, a layer or physical ids that are not held here.
        """
        tables = self._tables.get(placement_epoch)
        if tables is None:
            epochs = ", ".join(map(str, sorted(self._served)))
            raise ProtocolError(
                f"placement epoch {placement_epoch} is not held by EP rank {self._ep_rank}, "
                f"which holds {epochs}"
            )
        table = tables.get(layer_id)
        if table is None:
            raise ProtocolError(f"layer {layer_id} has no experts; MoE layers: {sorted(tables)}")
        # The table's first two entries stand for ids below -1 and for -1, its last for too large.
        index = physical_ids.long().clamp(-2, table.shape[0] - 3) + 2
        local = table[index]
        if local.numel() and local.min().item() == _NOT_HELD:
            self._refuse(placement_epoch, layer_id, physical_ids[local == _NOT_HELD])
        return local

    def _refuse(self, epoch: int, layer_id: int, physical_ids: Tensor) -> None:
        wrong: list[int] = torch.unique(physical_ids).tolist()
        held = self._served[epoch].layer(layer_id).physical_experts(self._ep_rank)
        raise ProtocolError(
            f"layer {layer_id}: physical ids {_shown(wrong)} are not held by EP rank "
            f"{self._ep_rank} in placement epoch {epoch}; it holds {_shown(held) or 'none'}"
        )

    def run(self, layer_id: int, hidden: Tensor, local_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Partial sums [num_tokens, hidden_size] in hidden's dtype, on this process's device.

        hidden: [num_tokens, hidden_size]. local_ids: [num_tokens, num_columns], see
        `local_ids`. topk_weights: [num_tokens, num_columns].
        """
        device = self._device
        return run_experts(
            self._store.layers[layer_id],
            hidden.to(device),
            local_ids.to(device),
            topk_weights.to(device),
        )


def _same(old: ExpertPlacement, new: ExpertPlacement, layer: LayerPlacement) -> bool:
    """Whether a layer's table is the same in both."""
    return old.ep_size == new.ep_size and old.layer(layer.layer_id) == layer


def _shown(ids: list[int] | tuple[int, ...]) -> str:
    shown = ", ".join(map(str, ids[:_MAX_IDS_IN_ERRORS]))
    return f"{shown}, … ({len(ids)} in all)" if len(ids) > _MAX_IDS_IN_ERRORS else shown
