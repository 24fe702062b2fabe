"""From physical ids to partial sums: this process's experts and where they are in its weights.

Knows the placement, this process's EP rank and its weights. Knows no transport's memory, no
queue and no peer.
"""

import torch
from torch import Tensor

from moe_core.errors import ProtocolError
from moe_core.model.experts import NO_EXPERT, run_experts
from moe_core.model.weights import ExpertLayerWeights
from moe_core.placement import ExpertPlacement, LayerPlacement

_NOT_HELD = -2
_MAX_IDS_IN_ERRORS = 16


class ExpertRunner:
    """Runs one EP rank's experts (one TP shard of them) of every MoE layer.

    weights: by layer id, experts stacked in slot order; all on `device`.
    """

    def __init__(
        self,
        weights: dict[int, ExpertLayerWeights],
        placement: ExpertPlacement,
        ep_rank: int,
        device: torch.device,
    ) -> None:
        self._weights = weights
        self._placement = placement
        self._ep_rank = ep_rank
        self._device = device
        self._local_ids = {
            layer.layer_id: _local_ids(layer, placement.ep_size, ep_rank, weights[layer.layer_id])
            for layer in placement.layers
        }

    def local_ids(self, placement_epoch: int, layer_id: int, physical_ids: Tensor) -> Tensor:
        """[num_tokens, num_columns] int64: places in this process's weights, or NO_EXPERT.

        Raises ProtocolError for an epoch, a layer or physical ids that are not held here.
        """
        if placement_epoch != self._placement.epoch:
            raise ProtocolError(
                f"placement epoch {placement_epoch} is not held by EP rank {self._ep_rank}, "
                f"which holds epoch {self._placement.epoch}"
            )
        table = self._local_ids.get(layer_id)
        if table is None:
            raise ProtocolError(
                f"layer {layer_id} has no experts; MoE layers: {sorted(self._local_ids)}"
            )
        # The table's first two entries stand for ids below -1 and for -1, its last for too large.
        index = physical_ids.long().clamp(-2, table.shape[0] - 3) + 2
        local = table[index]
        if local.numel() and local.min().item() == _NOT_HELD:
            self._refuse(layer_id, physical_ids[local == _NOT_HELD])
        return local

    def _refuse(self, layer_id: int, physical_ids: Tensor) -> None:
        wrong: list[int] = torch.unique(physical_ids).tolist()
        held = self._placement.layer(layer_id).physical_experts(self._ep_rank)
        raise ProtocolError(
            f"layer {layer_id}: physical ids {_shown(wrong)} are not held by EP rank "
            f"{self._ep_rank} in placement epoch {self._placement.epoch}; it holds {_shown(held)}"
        )

    def run(self, layer_id: int, hidden: Tensor, local_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Partial sums [num_tokens, hidden_size] in hidden's dtype, on this process's device.

        hidden: [num_tokens, hidden_size]. local_ids: [num_tokens, num_columns], see
        `local_ids`. topk_weights: [num_tokens, num_columns].
        """
        device = self._device
        return run_experts(
            self._weights[layer_id],
            hidden.to(device),
            local_ids.to(device),
            topk_weights.to(device),
        )


def _local_ids(
    layer: LayerPlacement, ep_size: int, ep_rank: int, weights: ExpertLayerWeights
) -> Tensor:
    """[2 + num_physical + ep_size + 1] int64: local ids by physical id + 2."""
    held = layer.physical_experts(ep_rank)
    if len(weights.w13) != len(held):
        raise ValueError(
            f"layer {layer.layer_id}: {len(weights.w13)} experts loaded, {len(held)} placed"
        )
    table = torch.full((2 + layer.num_physical + ep_size + 1,), _NOT_HELD, dtype=torch.int64)
    table[1] = NO_EXPERT
    for local, physical in enumerate(held):
        table[2 + physical] = local
    if weights.shared is not None:
        table[2 + layer.shared_physical_id(ep_rank)] = len(held)
    return table


def _shown(ids: list[int] | tuple[int, ...]) -> str:
    shown = ", ".join(map(str, ids[:_MAX_IDS_IN_ERRORS]))
    return f"{shown}, … ({len(ids)} in all)" if len(ids) > _MAX_IDS_IN_ERRORS else shown
