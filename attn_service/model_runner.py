"""Computes one step plan: decoder layers here, their experts wherever `Experts` says.

Knows the decoder's two halves, the KV cache and the order of the calls. Knows no scheduling, no
sampling and nobody's address.

Invariant: the order of all calls follows from the plan alone, never from when answers arrive, so
every rank of an attention TP group makes the same sequence of collectives. Layer by layer, each
micro-batch in turn takes its experts' answer of the layer before, computes attention and sends its
tokens: what one computes lies between another's dispatch and its combine.
"""

import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from attn_service.experts import Experts, LostRows, PendingExperts, StepKey
from attn_service.microbatches import split
from attn_service.prompt_logprobs import tell
from attn_service.sequence import SequenceSlice, StepPlan, TokenLogprobs
from attn_service.step_runner import StepResult
from attn_service.step_times import StepClock
from moe_core.model.batch import AttentionBatch
from moe_core.model.batch import SequenceSlice as BatchSlice
from moe_core.model.decoder import Decoder, DecoderLayer
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

    async def execute(self, plan: StepPlan) -> StepResult:
        """See `step_runner.StepRunner`: logits [m, vocab_size] float32, or float64 in float64.

        Writes the keys and values of the plan's tokens to their blocks; those of slices that are
        lost mean nothing. Raises TransportError, and then nothing that the step has sent holds a
        slot any longer than its peer does.
        """
        clock = StepClock()
        parts = split(plan.slices, plan.num_microbatches)
        microbatches = [
            self._microbatch(plan, number, part, clock) for number, part in enumerate(parts)
        ]
        try:
            for layer in self._decoder.layers:
                for each in microbatches:
                    await each.compute(layer)
            for each in microbatches:
                await each.take_answer()
        except BaseException:
            for each in microbatches:
                each.give_up()
            raise
        rows = torch.cat([each.last_rows() for each in microbatches])  # [m, hidden_size]
        order = _in_plan_order(plan, parts)
        if len(parts) > 1:
            rows = rows[torch.tensor(order, dtype=torch.int64, device=self._device)]
        told = self._told(plan, parts, microbatches)
        lost = {
            part[index]: reason
            for part, each in zip(parts, microbatches, strict=True)
            for index, reason in each.lost.items()
        }
        return StepResult(self._decoder.logits(rows), clock.times, lost, told)

    def _told(
        self,
        plan: StepPlan,
        parts: Sequence[Sequence[int]],
        microbatches: Sequence["_Microbatch"],
    ) -> dict[int, tuple[TokenLogprobs, ...]]:
        """See `StepResult.told`."""
        indices, asked, rows = [], [], []
        for part, each in zip(parts, microbatches, strict=True):
            for position, index in enumerate(part):
                wanted = plan.slices[index].asked_logprobs
                if wanted is not None:
                    indices.append(index)
                    asked.append(wanted)
                    rows.append(each.first_rows(position, len(wanted.token_ids)))
        if not asked:
            return {}
        decoder = self._decoder
        told = tell(torch.cat(rows), asked, decoder.logits, decoder.config.vocab_size)
        return dict(zip(indices, told, strict=True))

    def _microbatch(
        self, plan: StepPlan, number: int, part: Sequence[int], clock: StepClock
    ) -> "_Microbatch":
        slices = [plan.slices[index] for index in part]
        token_ids = [token for each in slices for token in each.token_ids]
        return _Microbatch(
            StepKey(plan.placement_epoch, plan.step, number),
            self._decoder.embed(torch.tensor(token_ids, device=self._device)),
            self._batch(slices),
            [each.needs_logits for each in slices],
            self._cache,
            self._experts,
            clock,
        )

    def _batch(self, slices: Sequence[SequenceSlice]) -> AttentionBatch:
        parts = [
            BatchSlice(part.block_table, part.num_computed_tokens, len(part.token_ids))
            for part in slices
        ]
        return AttentionBatch.build(parts, self._cache.block_size, self._device)


@dataclass(frozen=True, slots=True)
class _Away:
    """A micro-batch whose tokens are with the experts of `layer`."""

    layer: DecoderLayer
    residual: Tensor
    pending: PendingExperts


class _Microbatch:
    """Some of a step's sequences on their way through the layers.

    hidden: [n, hidden_size], the next layer's input; not up to date while `_away` says that experts
    have the tokens. needs_logits: of each sequence of `batch`. lost: sequences of `batch` of which
    some layer could not compute a row, and why; no later layer is asked for any row of theirs.
    `_rows`: those that layers are asked for, None for all.
    """

    def __init__(
        self,
        key: StepKey,
        hidden: Tensor,
        batch: AttentionBatch,
        needs_logits: Sequence[bool],
        cache: KvCache,
        experts: Experts,
        clock: StepClock,
    ) -> None:
        self._key = key
        self._hidden = hidden
        self._batch = batch
        self._needs_logits = needs_logits
        self._cache = cache
        self._experts = experts
        self._clock = clock
        self._away: _Away | None = None
        self._shared: Tensor | None = None
        self._rows: Tensor | None = None
        self.lost: dict[int, str] = {}

    async def compute(self, layer: DecoderLayer) -> None:
        """Everything of `layer` that needs no answer of its experts."""
        await self.take_answer()
        started = time.perf_counter()
        residual, hidden = layer.attend(self._hidden, self._batch, self._cache)
        self._clock.attention_s += time.perf_counter() - started
        if not layer.is_moe:
            self._hidden = layer.dense(residual, hidden)
            return
        topk_ids, topk_weights = layer.route(hidden)  # [n, top_k]
        started = time.perf_counter()
        pending = await self._experts.dispatch(
            self._key, layer.layer_id, hidden.to(layer.dtype), topk_ids, topk_weights, self._rows
        )
        self._clock.dispatch_s += time.perf_counter() - started
        self._away = _Away(layer, residual, pending)
        self._shared = layer.shared(hidden)  # while the tokens are away

    async def take_answer(self) -> None:
        """Finish the layer whose experts have the tokens, if one has them."""
        if self._away is None:
            return
        layer, residual = self._away.layer, self._away.residual
        routed, times, lost = await self._away.pending.combine()
        self._away = None
        self._clock.add(times)
        self._hidden = layer.finish(residual, routed, self._shared)
        if lost:
            self._lose(lost)

    def _lose(self, lost: Sequence[LostRows]) -> None:
        """What is lost of a sequence takes all of it out of the step."""
        starts = self._batch.query_start
        for each in lost:
            for row in each.rows.tolist():
                self.lost.setdefault(bisect_right(starts, row) - 1, each.reason)
        kept = [
            row
            for index, (start, end) in enumerate(pairwise(starts))
            if index not in self.lost
            for row in range(start, end)
        ]
        self._rows = torch.tensor(kept, dtype=torch.int64, device=self._hidden.device)

    def give_up(self) -> None:
        """The step has failed: the answer that is still to come is not wanted."""
        if self._away is not None:
            self._away.pending.release()

    def last_rows(self) -> Tensor:
        """[m, hidden_size]: the last row of each sequence whose next token is wanted."""
        ends = zip(self._batch.query_start[1:], self._needs_logits, strict=True)
        rows = [end - 1 for end, needed in ends if needed]
        return self._hidden[torch.tensor(rows, dtype=torch.int64, device=self._hidden.device)]

    def first_rows(self, position: int, count: int) -> Tensor:
        """[count, hidden_size]: of the sequence at `position` of `batch`."""
        start = self._batch.query_start[position]
        return self._hidden[start : start + count]


def _in_plan_order(plan: StepPlan, parts: Sequence[Sequence[int]]) -> list[int]:
    """Which of the micro-batches' wanted rows, one after the other, comes next in the plan."""
    wanted = [index for part in parts for index in part if plan.slices[index].needs_logits]
    return sorted(range(len(wanted)), key=wanted.__getitem__)
