"""Which process holds which physical expert.

Knows logical experts, physical slots and EP ranks of every MoE layer, for one epoch. Knows
nothing of addresses, weights or load, and not torch; whoever needs another placement builds a
new one.

Physical ids of one layer: 0 … num_physical-1 are routed slots; where the expert tier runs the
shared expert, `num_physical + ep_rank` is that EP group's copy of it.
"""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ConfigError
from moe_core.even_parts import even_parts


@dataclass(frozen=True)
class LayerPlacement:
    """physical_to_logical[p] and physical_to_ep_rank[p] for every routed physical slot p."""

    layer_id: int
    physical_to_logical: tuple[int, ...]
    physical_to_ep_rank: tuple[int, ...]

    @classmethod
    def of(cls, layer_id: int, held: Sequence[Sequence[int]]) -> Self:
        """From the logical experts that each EP group holds, by rank, in slot order."""
        logical = tuple(expert for group in held for expert in group)
        ep_rank = tuple(rank for rank, group in enumerate(held) for _ in group)
        return cls(layer_id, logical, ep_rank)

    @property
    def num_physical(self) -> int:
        return len(self.physical_to_logical)

    @cached_property
    def logical_to_physical(self) -> tuple[tuple[int, ...], ...]:
        """The physical slots that hold a copy of each logical expert, ascending."""
        num_logical = max(self.physical_to_logical, default=-1) + 1
        copies: list[list[int]] = [[] for _ in range(num_logical)]
        for physical, logical in enumerate(self.physical_to_logical):
            copies[logical].append(physical)
        return tuple(map(tuple, copies))

    def replicas(self, logical: int) -> tuple[int, ...]:
        """The physical slots that hold a copy of one logical expert, ascending."""
        return self.logical_to_physical[logical]

    def physical_experts(self, ep_rank: int) -> tuple[int, ...]:
        """The routed physical slots of one EP group, ascending; an expert's place in this
        tuple is its local index there."""
        return tuple(p for p, holder in enumerate(self.physical_to_ep_rank) if holder == ep_rank)

    def held(self, ep_size: int) -> list[tuple[int, ...]]:
        """The logical experts of every EP group, as `of` takes them."""
        return [self.logical_experts(ep_rank) for ep_rank in range(ep_size)]

    def logical_experts(self, ep_rank: int) -> tuple[int, ...]:
        """The logical experts of one EP group in slot order, as its weights are stacked."""
        return tuple(self.physical_to_logical[p] for p in self.physical_experts(ep_rank))

    def shared_physical_id(self, ep_rank: int) -> int:
        """The physical id of an EP group's copy of the shared expert."""
        return self.num_physical + ep_rank


@dataclass(frozen=True)
class ExpertPlacement:
    """Every MoE layer's tables. Raises ConfigError when built from tables that do not fit."""

    epoch: int
    num_logical_experts: int
    ep_size: int
    layers: tuple[LayerPlacement, ...]

    def __post_init__(self) -> None:
        for layer in self.layers:
            problem = self._problem(layer)
            if problem:
                raise ConfigError(
                    "placement", f"epoch {self.epoch} layer {layer.layer_id}", problem
                )

    def _problem(self, layer: LayerPlacement) -> str:
        """What makes a layer's tables unusable, or nothing."""
        logical, holders = layer.physical_to_logical, layer.physical_to_ep_rank
        if len(logical) != len(holders):
            return f"{len(logical)} physical slots, but {len(holders)} holders"
        if set(logical) != set(range(self.num_logical_experts)):
            return f"must hold exactly the experts 0 to {self.num_logical_experts - 1}"
        if not set(holders) <= set(range(self.ep_size)):
            return f"EP ranks must be below ep_size={self.ep_size}"
        if len(set(zip(logical, holders, strict=True))) < len(logical):
            return "copies of one expert must be on different EP groups"
        return ""

    @classmethod
    def initial(cls, model: ModelConfig, parallel: ParallelConfig) -> Self:
        """Epoch 0: contiguous experts per EP group, copies spread, every layer alike."""
        num_experts, ep_size = model.moe.num_experts, parallel.ep_size
        held = _spread(num_experts, parallel.num_redundant_experts, ep_size)
        layers = (LayerPlacement.of(layer_id, held) for layer_id in model.moe_layer_ids)
        return cls(0, num_experts, ep_size, tuple(layers))

    @cached_property
    def _by_layer_id(self) -> dict[int, LayerPlacement]:
        return {layer.layer_id: layer for layer in self.layers}

    def layer(self, layer_id: int) -> LayerPlacement:
        """Raises KeyError for a layer without experts."""
        return self._by_layer_id[layer_id]

    @cached_property
    def holders(self) -> frozenset[int]:
        """The EP ranks that hold an expert of any layer."""
        return frozenset(rank for layer in self.layers for rank in layer.physical_to_ep_rank)

    def is_covered_by(self, ep_ranks: Set[int]) -> bool:
        """Whether these EP groups hold every expert of every layer."""
        return all(
            any(layer.physical_to_ep_rank[slot] in ep_ranks for slot in slots)
            for layer in self.layers
            for slots in layer.logical_to_physical
        )

    def num_local_experts(self, ep_rank: int) -> int:
        """The most routed experts that one layer puts on one EP group."""
        return max((len(layer.physical_experts(ep_rank)) for layer in self.layers), default=0)


def _spread(num_experts: int, num_redundant: int, ep_size: int) -> list[list[int]]:
    """The logical experts that each EP group holds, sorted.

    Invariants: group sizes differ by at most one; no group holds an expert twice; copies per
    expert differ by at most one. First copies are contiguous, because group-limited routers
    choose neighbours together and a token then goes to fewer processes.
    """
    capacity = even_parts(num_experts + num_redundant, ep_size)
    held: list[list[int]] = []
    for size in even_parts(num_experts, ep_size):
        start = sum(map(len, held))
        held.append(list(range(start, start + size)))
    homes = {expert: rank for rank, group in enumerate(held) for expert in group}
    for expert in _experts_to_copy(num_experts, num_redundant):
        _add_copy(held, capacity, expert, homes[expert])
    return [sorted(group) for group in held]


def _experts_to_copy(num_experts: int, num_redundant: int) -> Iterable[int]:
    """Whole rounds over all experts, then one round of evenly spaced ones."""
    rounds, rest = divmod(num_redundant, num_experts)
    for _ in range(rounds):
        yield from range(num_experts)
    yield from (index * num_experts // rest for index in range(rest))


def _add_copy(held: list[list[int]], capacity: list[int], expert: int, home: int) -> None:
    """Put one more copy of `expert` on a group without it, best on the far side of its home.

    Where every group with room has one already, some full group `full` has none. It is no
    smaller than the group with room, `spare`, which holds an expert that `full` does not; so
    `full` holds one that `spare` does not, and giving it away makes room.
    """
    num_groups = len(held)
    spare = [rank for rank in range(num_groups) if len(held[rank]) < capacity[rank]]
    lacking = [rank for rank in spare if expert not in held[rank]]
    if lacking:
        far = home + num_groups // 2
        target = min(lacking, key=lambda r: (len(held[r]) - capacity[r], (r - far) % num_groups))
        held[target].append(expert)
        return
    full = next(rank for rank in range(num_groups) if expert not in held[rank])
    moved = next(e for e in reversed(held[full]) if e not in held[spare[0]])
    held[full].remove(moved)
    held[full].append(expert)
    held[spare[0]].append(moved)
