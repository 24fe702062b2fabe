"""The attention side of the exchange: one layer's tokens out to the expert tier, one sum back.

Implements `Experts` over one `ExpertLink` per expert process. Knows the placements and the
attention TP group; knows no wire (moe_core/transport does) and no model.

Invariants:
* A layer's dispatches are all posted, and their bytes gone, before any combine is awaited.
* Partials are summed in ascending rank order, in fp32 (fp64 for float64), and only when every
  one is there; a token's sum is complete or the layer raises.
* Every dispatch that was posted is released, whatever became of it, so no slot stays taken by
  a layer that failed.

Weights travel as float32, as every transport carries them, whatever the model's dtype.

With attention TP each rank exchanges only its share of the rows and `combine` all-gathers. A
rank whose exchange failed raises and leaves that collective out; the others find it missing
when the collective's own deadline ends.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_service.dispatch_plan import (
    GroupDispatch,
    plan_dispatch,
    with_shared_weight,
)
from attn_service.experts import Combined, ExpertTimes, StepKey
from attn_service.placements import Placements
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import PeerFailedError, TransportError
from moe_core.model.experts import accumulation_dtype
from moe_core.model.tensor_parallel import TensorParallel
from moe_core.transport.base import Combine, Dispatch, DispatchKey, ExpertLink, PendingCombine

_MAX_EXPERTS_IN_ERRORS = 16


@dataclass(slots=True)
class _Sent:
    """What one expert process is sent of a layer, and the answer to come once it is on its way."""

    link: ExpertLink
    group: GroupDispatch
    dispatch: Dispatch
    answer: PendingCombine | None = None

    def release(self) -> None:
        if self.answer is not None:
            self.answer.release()


class ExpertClient:
    """Computes MoE layers on the expert tier.

    links: one per expert process, in rank order. turn_offset: where this process starts taking
    turns among copies, so that processes with small batches do not all pick the same; equal on
    all ranks of a TP group or not, the sums are the same. expert_wait_s: the longest one layer
    may take from its dispatch to its last combine.
    """

    def __init__(
        self,
        links: Sequence[ExpertLink],
        parallel: ParallelConfig,
        placements: Placements,
        tensor_parallel: TensorParallel,
        *,
        expert_wait_s: float,
        turn_offset: int = 0,
    ) -> None:
        if len(links) != parallel.expert_devices:
            raise ValueError(f"{len(links)} links for {parallel.expert_devices} expert processes")
        self._links = tuple(links)
        self._parallel = parallel
        self._placements = placements
        self._tensor_parallel = tensor_parallel
        self._expert_wait_s = expert_wait_s
        self._turn_offset = turn_offset

    async def dispatch(
        self,
        key: StepKey,
        layer_id: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
    ) -> "PendingLayer":
        """See `Experts.dispatch`; a TransportError names peer, layer and experts."""
        tensor_parallel = self._tensor_parallel
        sizes = even_parts(hidden_states.shape[0], tensor_parallel.size)
        start = sum(sizes[: tensor_parallel.rank])
        own = slice(start, start + sizes[tensor_parallel.rank])
        deadline = asyncio.get_running_loop().time() + self._expert_wait_s
        groups = plan_dispatch(
            self._placements.tables(key.placement_epoch, layer_id),
            topk_ids[own],
            self._parallel.degree,
            self._parallel.shared_on_experts,
            first_token=start + layer_id + self._turn_offset,
        )
        wire_key = DispatchKey(key.placement_epoch, key.step, layer_id, key.microbatch)
        hidden = hidden_states[own]
        weights = with_shared_weight(topk_weights[own].float(), self._parallel.shared_on_experts)
        sent = await self._post(wire_key, hidden, weights, groups, deadline)
        return PendingLayer(self, hidden, sizes, sent, deadline)

    async def _post(
        self,
        key: DispatchKey,
        hidden: Tensor,
        weights: Tensor,
        groups: Sequence[GroupDispatch],
        deadline: float,
    ) -> list[_Sent]:
        """Post all dispatches of a layer; when one fails, give up those that went out."""
        sent = [
            _Sent(link, group, dispatch)
            for group in groups
            for dispatch in [_dispatch_of(key, hidden, weights, group)]
            for link in self._group_links(group.ep_rank)
        ]
        try:
            for each in sent:
                each.answer = each.link.try_dispatch(each.dispatch)
            # Those that have to wait for a slot wait together.
            slow = [each for each in sent if each.answer is None]
            if slow:
                await _all([asyncio.create_task(self._depart(each, deadline)) for each in slow])
            for each in sent:
                await self._depart(each, deadline)
        except BaseException:
            for each in sent:
                each.release()
            raise
        return sent

    async def _depart(self, sent: _Sent, deadline: float) -> None:
        """Until its bytes have left."""
        timeout_s = max(0.0, deadline - asyncio.get_running_loop().time())
        try:
            if sent.answer is None:
                sent.answer = await sent.link.dispatch(sent.dispatch, timeout_s)
            else:
                await sent.answer.left(timeout_s)
        except TransportError as error:
            raise self.explain(error, sent) from error

    def _group_links(self, ep_rank: int) -> tuple[ExpertLink, ...]:
        """The links to one EP group's processes; its TP shards all get the same rows."""
        etp_size = self._parallel.etp_size
        return self._links[ep_rank * etp_size : (ep_rank + 1) * etp_size]

    def explain(self, error: TransportError, sent: _Sent) -> TransportError:
        """The same error, saying also which experts were needed from that peer."""
        key, physical_ids = sent.dispatch.key, sent.group.physical_ids
        placement = self._placements.at(key.placement_epoch).layer(key.layer_id)
        physical = torch.unique(physical_ids[physical_ids >= 0]).tolist()
        logical = placement.physical_to_logical
        names = [str(logical[p]) if p < placement.num_physical else "shared" for p in physical]
        shown = ", ".join(dict.fromkeys(names[:_MAX_EXPERTS_IN_ERRORS]))
        more = ", …" if len(names) > _MAX_EXPERTS_IN_ERRORS else ""
        text = f"{error} (for layer {key.layer_id}, experts {shown}{more})"
        if isinstance(error, PeerFailedError):
            return PeerFailedError(text, error.code)
        return type(error)(text)

    def gather_rows(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        return self._tensor_parallel.all_gather(rows, sizes)


class PendingLayer:
    """One layer's dispatches of which the bytes have left."""

    def __init__(
        self,
        client: ExpertClient,
        hidden: Tensor,
        sizes: Sequence[int],
        sent: Sequence[_Sent],
        deadline: float,
    ) -> None:
        self._client = client
        self._like = hidden
        self._sizes = sizes
        self._sent = sent
        self._deadline = deadline

    async def combine(self) -> Combined:
        """See `PendingExperts.combine`."""
        started = time.perf_counter()
        try:
            answers = [await self._answer(sent) for sent in self._sent]
            complete = time.perf_counter()
            total = self._sum([answer.partial for answer in answers])
        finally:
            self.release()
        hidden = self._client.gather_rows(total, self._sizes)
        queue_us, compute_us = _of_the_slowest(answers)
        times = ExpertTimes(
            wait_s=complete - started,
            queue_s=queue_us * 1e-6,
            compute_s=compute_us * 1e-6,
            combine_s=time.perf_counter() - complete,
        )
        return Combined(hidden, times)

    def release(self) -> None:
        """See `PendingExperts.release`."""
        for sent in self._sent:
            sent.release()

    async def _answer(self, sent: _Sent) -> Combine:
        """Its partial is valid until `sent` is released."""
        assert sent.answer is not None
        timeout_s = max(0.0, self._deadline - asyncio.get_running_loop().time())
        started = time.perf_counter()
        try:
            return await sent.answer.wait(timeout_s)
        except TransportError as error:
            raise self._client.explain(error, sent) from error
        finally:  # answers are awaited one after the other, so no second counts twice
            sent.link.counters.wait_s += time.perf_counter() - started

    def _sum(self, partials: Sequence[Tensor]) -> Tensor:
        """In the order of dispatch, which is ascending rank."""
        like = self._like
        total = like.new_zeros(like.shape, dtype=accumulation_dtype(like.dtype))
        for sent, partial in zip(self._sent, partials, strict=True):
            rows, partial = sent.group.rows, partial.to(like.device)
            if rows is None:
                total += partial
            else:  # a row is there once, so the order of additions inside is no matter
                total.index_add_(0, rows, partial.to(total.dtype))
        return total.to(like.dtype)


def even_parts(total: int, parts: int) -> list[int]:
    """`total` rows over `parts` ranks, the first ones one longer where it does not divide."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def _dispatch_of(
    key: DispatchKey, hidden: Tensor, weights: Tensor, group: GroupDispatch
) -> Dispatch:
    if group.rows is None:
        return Dispatch(key, hidden, group.physical_ids, weights)
    return Dispatch(key, hidden[group.rows], group.physical_ids, weights[group.rows])


def _of_the_slowest(answers: Sequence[Combine]) -> tuple[int, int]:
    """Queue and compute microseconds of the process that took longest."""
    times = ((answer.queue_us, answer.compute_us) for answer in answers)
    return max(times, key=sum, default=(0, 0))


async def _all(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Until all have ended; raises what the first of them (by rank) raised. A cancelled caller
    leaves none of them running."""
    try:
        await asyncio.wait(tasks)
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        raise
    failures = [error for error in (task.exception() for task in tasks) if error is not None]
    if failures:
        raise failures[0]
