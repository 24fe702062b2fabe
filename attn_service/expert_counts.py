"""How many tokens the router has given to each expert, layer by layer.

Knows logical experts and MoE layers. Knows neither placements nor processes: it counts what goes by
on the way to the `Experts` that it wraps. A token that is computed again, after a preemption or a
failed step, counts again, since it costs again.
"""

import torch
from torch import Tensor

from attn_service.experts import Experts, PendingExperts, StepKey
from moe_core.cluster import ExpertLoad
from moe_core.config.model import ModelConfig


class CountedExperts:
    """An `Experts` that counts before it hands on; on `device` nothing is waited for."""

    def __init__(self, experts: Experts, model: ModelConfig, device: torch.device) -> None:
        self._experts = experts
        self._layer_ids = model.moe_layer_ids
        shape = (len(self._layer_ids), model.moe.num_experts)
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._of_layer = dict(zip(self._layer_ids, self._tokens.unbind(), strict=True))
        self._one = torch.ones(1, dtype=torch.int64, device=device)

    async def dispatch(
        self,
        key: StepKey,
        layer_id: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        rows: Tensor | None = None,
    ) -> PendingExperts:
        """See `Experts.dispatch`."""
        chosen = (topk_ids if rows is None else topk_ids[rows]).flatten()  # [n * top_k]
        # Not bincount, which on CUDA waits for the largest id.
        self._of_layer[layer_id].scatter_add_(0, chosen, self._one.expand(chosen.shape))
        return await self._experts.dispatch(
            key, layer_id, hidden_states, topk_ids, topk_weights, rows
        )

    @property
    def load(self) -> ExpertLoad:
        """Totals since this was made. Waits for the device, so ask seldom."""
        rows: list[list[int]] = self._tokens.tolist()
        return ExpertLoad(self._layer_ids, tuple(map(tuple, rows)))
