"""Computes one step plan: decoder layers here, their experts wherever `Experts` says.

Knows the decoder's two halves, the KV cache and the order of the calls. Knows no scheduling, no
sampling and nobody's address. On every rank of an attention TP group the same plan makes the
same sequence of collectives.
"""

import torch

from attn_service.experts import Experts, StepKey
from attn_service.sequence import StepPlan
from moe_core.model.batch import AttentionBatch
from moe_core.model.batch import SequenceSlice as BatchSlice
from moe_core.model.decoder import Decoder
from moe_core.model.kv_cache import KvCache

Tensor = torch.Tensor


class ModelRunner:
    def __init__(
        self, decoder: Decoder, cache: KvCache, experts: Experts, device: torch.device
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._experts = experts
        self._device = device

    async def execute(self, plan: StepPlan) -> Tensor:
        """See `engine.StepRunner`: logits [m, vocab_size] float32, or float64 in float64.

        Writes the keys and values of the plan's tokens to their blocks. Raises TransportError.
        """
        batch = self._batch(plan)
        token_ids = [token for part in plan.slices for token in part.token_ids]
        hidden = self._decoder.embed(torch.tensor(token_ids, device=self._device))  # [n, hidden]
        key = StepKey(plan.placement_epoch, plan.step)
        for layer in self._decoder.layers:
            residual, hidden = layer.attend(hidden, batch, self._cache)
            if layer.is_moe:
                topk_ids, topk_weights = layer.route(hidden)  # [n, top_k]
                pending = await self._experts.dispatch(
                    key, layer.layer_id, hidden, topk_ids, topk_weights
                )
                shared = layer.shared(hidden)  # while the tokens are away
                hidden = layer.finish(residual, await pending.combine(), shared)
            else:
                hidden = layer.dense(residual, hidden)
        return self._decoder.logits(hidden[self._last_rows(plan, batch)])

    def _batch(self, plan: StepPlan) -> AttentionBatch:
        slices = [
            BatchSlice(part.block_table, part.num_computed_tokens, len(part.token_ids))
            for part in plan.slices
        ]
        return AttentionBatch.build(slices, self._cache.block_size, self._device)

    def _last_rows(self, plan: StepPlan, batch: AttentionBatch) -> Tensor:
        """[m] int64: the last row of each sequence whose next token is wanted."""
        ends = zip(plan.slices, batch.query_start[1:], strict=True)
        rows = [end - 1 for part, end in ends if part.needs_logits]
        return torch.tensor(rows, dtype=torch.int64, device=self._device)
