"""Joins what many attention processes want of one layer into one grouped run.

Knows queued dispatches, their order and their replies. Knows no transport and no weights.
Dispatches of several placements join: what they ask for are places in the same weights.

Invariants: the oldest dispatch is never overtaken by another layer's; what joins it is in
order of arrival; every accepted dispatch is answered exactly once. No torch work happens inside
the transport's callback: runs are events of their own, one at a time, so that the transport
reads and writes between two of them.
"""

import asyncio
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from expert_service.expert_runner import ExpertRunner
from moe_core.errors import EpserveError, ProtocolError
from moe_core.placement import ExpertPlacement
from moe_core.transport.base import Dispatch, Reply


@dataclass(frozen=True, slots=True)
class _Queued:
    dispatch: Dispatch
    reply: Reply
    local_ids: Tensor  # [num_tokens, num_columns] int64
    arrived: float  # seconds, time.perf_counter


class BatchObserver(Protocol):
    def ran(
        self,
        layer_id: int,
        joined: Sequence[tuple[Dispatch, Reply]],
        began_s: float,
        ended_s: float,
    ) -> None:
        """A run is over and its replies are out, so the tensors of `joined` are no longer to be
        read. Seconds of time.perf_counter. Must not fail or wait."""


class Batcher:
    """A DispatchHandler: `handler = batcher.submit`."""

    def __init__(self, runner: ExpertRunner, observer: BatchObserver | None = None) -> None:
        self._runner = runner
        self._observer = observer
        self._queue: list[_Queued] = []
        self._scheduled = False
        self._empty = asyncio.Event()
        self._empty.set()
        # Set to the exception of a run that failed; an error that is nobody's request's.
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def submit(self, dispatch: Dispatch, reply: Reply) -> None:
        """Queue a dispatch; one that asks for what is not here is failed at once, alone."""
        key = dispatch.key
        try:
            local_ids = self._runner.local_ids(
                key.placement_epoch, key.layer_id, dispatch.physical_ids
            )
        except ProtocolError as error:
            reply.fail(error)
            return
        self._queue.append(_Queued(dispatch, reply, local_ids, time.perf_counter()))
        self._schedule()

    def retain(self, placements: Collection[ExpertPlacement]) -> bool:
        """Serve and hold what `placements` need and nothing more (see `ExpertRunner.retain`).
        False, with nothing changed, while a dispatch of another placement waits."""
        served = self._runner.served
        epochs = {placement.epoch for placement in placements if placement in served}
        if any(each.dispatch.key.placement_epoch not in epochs for each in self._queue):
            return False
        self._runner.retain(placements)
        return True

    async def idle(self, timeout_s: float) -> None:
        """Returns when nothing is queued, or after `timeout_s` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()

    def _schedule(self) -> None:
        self._empty.clear()
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._run_oldest)

    def _run_oldest(self) -> None:
        self._scheduled = False
        layer_id = self._queue[0].dispatch.key.layer_id
        joined = [each for each in self._queue if each.dispatch.key.layer_id == layer_id]
        self._queue = [each for each in self._queue if each.dispatch.key.layer_id != layer_id]
        self._answer(layer_id, joined)
        if self._queue:
            self._schedule()
        else:
            self._empty.set()

    def _answer(self, layer_id: int, joined: list[_Queued]) -> None:
        started = time.perf_counter()
        try:
            partial = self._run(layer_id, joined)
        except Exception as error:  # ends the process, but its peers are told why first
            self._fail(layer_id, joined, error)
            return
        ended = time.perf_counter()
        compute_us = _microseconds(ended - started)
        parts = torch.split(partial, [each.dispatch.num_tokens for each in joined])
        for each, part in zip(joined, parts, strict=True):
            each.reply.complete(part, _microseconds(started - each.arrived), compute_us)
        if self._observer is not None:
            pairs = [(each.dispatch, each.reply) for each in joined]
            self._observer.ran(layer_id, pairs, started, ended)

    def _run(self, layer_id: int, joined: list[_Queued]) -> Tensor:
        return self._runner.run(
            layer_id,
            _joined([each.dispatch.hidden_states for each in joined]),
            _joined([each.local_ids for each in joined]),
            _joined([each.dispatch.topk_weights for each in joined]),
        )

    def _fail(self, layer_id: int, joined: list[_Queued], error: Exception) -> None:
        for each in joined:
            each.reply.fail(EpserveError(f"layer {layer_id} failed on its expert process: {error}"))
        if not self.failed.done():
            self.failed.set_exception(error)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
