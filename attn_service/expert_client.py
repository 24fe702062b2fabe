"""The attention side of the exchange: one layer's tokens out to the expert tier, one sum back.

Implements `Experts` over the links to the expert processes. Knows the placements and the
attention TP group; knows no wire (moe_core/transport does) and no model, and leaves what fails or
is late to failover.py.

Invariants:
* A layer's dispatches are all posted, and their bytes gone, before any combine is awaited.
* Partials are summed in ascending rank order, in fp32 (fp64 for float64), and only when every
  one is there; a token's sum is complete or the token is among the lost rows.
* Every dispatch that was posted is released, whatever became of it, so no slot stays taken by
  a layer that failed.

Weights travel as float32, as every transport carries them, whatever the model's dtype.

With attention TP each rank exchanges only its share of the rows and `combine` all-gathers. Rows
that a rank has lost are zeros in what is gathered; which they are the ranks tell each other once
a step (group_experts.py).
"""

import asyncio
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from attn_service import exchange_words
from attn_service.dispatch_plan import GroupDispatch, plan_dispatch, with_shared_weight
from attn_service.experts import Combined, ExpertTimes, LostRows, StepKey
from attn_service.failover import LayerExchange
from attn_service.peers import Peers
from attn_service.placements import Placements
from attn_service.replica_choice import LayerTables
from attn_service.sends import Send
from moe_core.config.parallel import ParallelConfig
from moe_core.even_parts import even_parts
from moe_core.model.experts import accumulation_dtype
from moe_core.model.tensor_parallel import TensorParallel
from moe_core.placement import LayerPlacement
from moe_core.transport.base import DispatchKey

# Of expert_wait_s, where no time is set: leaves as much for those who are asked then.
DEFAULT_PATIENCE = 0.5


class ExpertClient:
    """Computes MoE layers on the expert tier.

    turn_offset: where this process starts taking turns among copies, so that processes with small
    batches do not all pick the same; equal on all ranks of a TP group or not, the sums are the
    same. expert_wait_s: the longest one layer may take from its dispatch to its last combine.
    hedge_after_s: how long a process may take before others are asked for the same; None for half
    of expert_wait_s.
    """

    def __init__(
        self,
        peers: Peers,
        parallel: ParallelConfig,
        placements: Placements,
        tensor_parallel: TensorParallel,
        *,
        expert_wait_s: float,
        hedge_after_s: float | None = None,
        turn_offset: int = 0,
    ) -> None:
        self._peers = peers
        self._parallel = parallel
        self._placements = placements
        self._tensor_parallel = tensor_parallel
        self._expert_wait_s = expert_wait_s
        self._patience_s = hedge_after_s or DEFAULT_PATIENCE * expert_wait_s
        self._turn_offset = turn_offset

    async def dispatch(
        self,
        key: StepKey,
        layer_id: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        rows: Tensor | None = None,
    ) -> "PendingLayer":
        """See `Experts.dispatch`. Raises ProtocolError for a placement epoch that is unknown."""
        sizes, own = self._shares(hidden_states.shape[0])
        now = asyncio.get_running_loop().time()
        placement = self._placements.at(key.placement_epoch)
        layer = placement.layer(layer_id)
        tables_of = partial(self._placements.tables, key.placement_epoch, layer_id)
        tables = tables_of(self._peers.standing(placement.ep_size, now))
        first_token = own.start + layer_id + self._turn_offset
        hidden, routing = hidden_states[own], topk_ids[own]
        lost: tuple[LostRows, ...] = ()
        if rows is not None or tables.lost is not None:
            rows = _rows_within(rows, own, routing.device)
            rows, lost = self._without_lost(tables, layer, routing, rows)
        groups = self._plan(tables, routing, rows, first_token)
        shared_on_experts = self._parallel.shared_on_experts
        exchange = LayerExchange(
            self._peers,
            layer,
            tables_of,
            placement.ep_size,
            DispatchKey(key.placement_epoch, key.step, layer_id, key.microbatch),
            hidden,
            with_shared_weight(topk_weights[own].float(), shared_on_experts),
            first_token,
            self._patience_s,
            now + self._expert_wait_s,
        )
        await exchange.post(groups)
        return PendingLayer(self, exchange, hidden, sizes, lost)

    def _shares(self, num_rows: int) -> tuple[list[int], slice]:
        """How many rows each rank of the TP group exchanges, and which this one does."""
        rank, size = self._tensor_parallel.rank, self._tensor_parallel.size
        sizes = even_parts(num_rows, size)
        start = sum(sizes[:rank])
        return sizes, slice(start, start + sizes[rank])

    def _plan(
        self, tables: LayerTables, routing: Tensor, rows: Tensor | None, first_token: int
    ) -> list[GroupDispatch]:
        """Who is sent what of `rows` (None: all)."""
        level, shared_on_experts = self._parallel.degree, self._parallel.shared_on_experts
        if rows is None:
            return plan_dispatch(tables, routing, level, shared_on_experts, first_token)
        groups = plan_dispatch(tables, routing[rows], level, shared_on_experts, first_token)
        return [group.within(rows) for group in groups]

    def _without_lost(
        self,
        tables: LayerTables,
        layer: LayerPlacement,
        routing: Tensor,
        rows: Tensor,
    ) -> tuple[Tensor, tuple[LostRows, ...]]:
        """Those of this rank's `rows` whose experts can all be asked, and the others."""
        if tables.lost is None:
            return rows, ()
        lost = tables.lost[routing[rows].long()]  # [n, top_k]
        beyond = lost.any(dim=1)
        if not bool(beyond.any()):
            return rows, ()
        missing: list[int] = torch.unique(routing[rows][lost]).tolist()
        holders = {
            layer.physical_to_ep_rank[slot] for each in missing for slot in layer.replicas(each)
        }
        reasons = map(self._peers.why_down, sorted(holders))
        reason = exchange_words.nobody_holds(layer, missing, reasons)
        return rows[~beyond], (LostRows(rows[beyond], reason),)

    def gather_rows(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        return self._tensor_parallel.all_gather(rows, sizes)

    def in_all_rows(self, lost: Sequence[LostRows], sizes: Sequence[int]) -> tuple[LostRows, ...]:
        """Rows of this rank's share as rows of the whole."""
        start = sum(sizes[: self._tensor_parallel.rank])
        return tuple(LostRows(each.rows + start, each.reason) for each in lost)

    def note_times(self, sends: Sequence[Send]) -> tuple[int, int]:
        """Queue and compute microseconds of the process that took longest."""
        slowest = (0, 0)
        for send in sends:
            for part in send.parts:
                if part.combine is not None:
                    queue_us, compute_us = part.combine.queue_us, part.combine.compute_us
                    self._peers.answered(send.ep_rank, queue_us)
                    slowest = max(slowest, (queue_us, compute_us), key=sum)
        return slowest


class PendingLayer:
    """One layer's dispatches of which the bytes have left. lost: rows of this rank's share that
    were not sent."""

    def __init__(
        self,
        client: ExpertClient,
        exchange: LayerExchange,
        hidden: Tensor,
        sizes: Sequence[int],
        lost: tuple[LostRows, ...],
    ) -> None:
        self._client = client
        self._exchange = exchange
        self._like = hidden
        self._sizes = sizes
        self._lost = lost

    async def combine(self) -> Combined:
        """See `PendingExperts.combine`."""
        started = time.perf_counter()
        try:
            await self._exchange.complete()
            complete = time.perf_counter()
            sends = self._exchange.counted
            lost = (*self._lost, *self._exchange.lost)
            total = self._sum(sends, lost)
        finally:
            self.release()
        hidden = self._client.gather_rows(total, self._sizes)
        queue_us, compute_us = self._client.note_times(sends)
        times = ExpertTimes(
            wait_s=complete - started,
            queue_s=queue_us * 1e-6,
            compute_s=compute_us * 1e-6,
            combine_s=time.perf_counter() - complete,
        )
        if lost:
            lost = self._client.in_all_rows(lost, self._sizes)
        return Combined(hidden, times, lost)

    def release(self) -> None:
        """See `PendingExperts.release`."""
        self._exchange.release()

    def _sum(self, sends: Sequence[Send], lost: Sequence[LostRows]) -> Tensor:
        """In the order of `sends`, which is ascending rank."""
        like = self._like
        total = like.new_zeros(like.shape, dtype=accumulation_dtype(like.dtype))
        for send in sends:
            rows, partials = send.partials()
            for each in partials:
                partial_sum = each.to(like.device)
                if rows is None:
                    total += partial_sum
                else:  # a row is there once, so the order of additions inside is no matter
                    total.index_add_(0, rows, partial_sum.to(total.dtype))
        for rows_lost in lost:
            total[rows_lost.rows] = 0
        return total.to(like.dtype)


def _rows_within(rows: Tensor | None, own: slice, device: torch.device) -> Tensor:
    """Those of `rows` (None: all) that are in `own`, counted from its start."""
    if rows is None:
        return torch.arange(own.stop - own.start, device=device)
    inside = (rows >= own.start) & (rows < own.stop)
    return rows[inside].sub(own.start)
