"""The experts that this process holds, by layer.

Knows logical experts and their matrices. Knows no placement, no epoch and no file.

Invariant: an expert's local id is its logical id, whatever else comes and goes; the shared expert's
is the one after the last. Copies of one expert are on different EP groups, so no process holds two.
"""

from collections.abc import Iterable, Mapping

from moe_core.model.matrix_forms import Matrix
from moe_core.model.weights import ExpertLayerWeights, ExpertWeights, MlpWeights


class ExpertStore:
    """`layers` is what `run_experts` takes, and always as the store is now."""

    def __init__(self, num_logical_experts: int, shared: Mapping[int, MlpWeights | None]) -> None:
        """`shared` by the id of every MoE layer; the shared expert stays for good."""
        self._w13: dict[int, list[Matrix | None]] = {}
        self._w2: dict[int, list[Matrix | None]] = {}
        self.layers: dict[int, ExpertLayerWeights] = {}
        self._held: dict[int, set[int]] = {}
        for layer_id, mlp in shared.items():
            self._w13[layer_id] = [None] * num_logical_experts
            self._w2[layer_id] = [None] * num_logical_experts
            self._held[layer_id] = set()
            self.layers[layer_id] = ExpertLayerWeights(self._w13[layer_id], self._w2[layer_id], mlp)

    @property
    def num_experts(self) -> int:
        """Routed experts held, over all layers."""
        return sum(map(len, self._held.values()))

    def held(self, layer_id: int) -> frozenset[int]:
        return frozenset(self._held[layer_id])

    def expert(self, layer_id: int, logical: int) -> ExpertWeights | None:
        """None where it is not held, or the model has no such layer or expert."""
        if logical not in self._held.get(layer_id, ()):
            return None
        w13, w2 = self._w13[layer_id][logical], self._w2[layer_id][logical]
        assert w13 is not None
        assert w2 is not None
        return ExpertWeights(w13, w2)

    def put(self, layer_id: int, logical: int, weights: ExpertWeights) -> None:
        self._w13[layer_id][logical] = weights.w13
        self._w2[layer_id][logical] = weights.w2
        self._held[layer_id].add(logical)

    def drop_others(self, layer_id: int, kept: Iterable[int]) -> int:
        """Let go of a layer's routed experts but `kept`; says how many. Nobody may run them again
        before they are put back."""
        dropped = self._held[layer_id].difference(kept)
        for logical in dropped:
            self._w13[layer_id][logical] = None
            self._w2[layer_id][logical] = None
        self._held[layer_id] -= dropped
        return len(dropped)
