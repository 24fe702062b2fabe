"""Which process holds which physical expert.

Knows logical experts, physical slots and EP ranks of every MoE layer, for one epoch. Knows
nothing of addresses, weights or load; whoever needs another placement builds a new one.

Physical ids of one layer: 0 … num_physical-1 are routed slots; where the expert tier runs the
shared expert, `num_physical + ep_rank` is that EP group's copy of it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerPlacement:
    """physical_to_logical[p] and physical_to_ep_rank[p] for every routed physical slot p."""

    layer_id: int
    physical_to_logical: tuple[int, ...]
    physical_to_ep_rank: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    epoch: int
    num_logical_experts: int
    ep_size: int
    layers: tuple[LayerPlacement, ...]
