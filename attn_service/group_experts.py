"""The experts as an attention TP group uses them: a step fails on all ranks alike, or on none, and
what is lost of it is lost on all.

Knows the group's collectives and that each rank exchanges only its share of the rows. Knows no
links and no layers.

Invariant: from the first to the last layer of a step every rank calls the same collectives,
even one whose exchange has failed or has lost rows: it puts in zeros for them. `settle`, called by
every rank once the step is over, makes one of all ranks' outcomes before anybody uses the result:
what such a step has computed is worthless, so it raises the first failure (by rank); and a slice of
which some rank has lost a row is lost.
"""

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

import structlog
import torch
from torch import Tensor

from attn_service.experts import Combined, Experts, ExpertTimes, PendingExperts, StepKey
from attn_service.sequence import StepPlan
from attn_service.step_runner import EngineObserver, StepResult, StepRunner
from moe_core.errors import PeerLostError, TransportError
from moe_core.even_parts import even_parts
from moe_core.model.tensor_parallel import TensorParallel

log = structlog.get_logger(__name__)

MESSAGE_BYTES = 2048


class AgreedTransportError(TransportError):
    """What one rank of the group met, as all ranks of the group report it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class GroupExperts:
    """Wraps this rank's Experts."""

    def __init__(self, experts: Experts, tensor_parallel: TensorParallel) -> None:
        self._experts = experts
        self._tensor_parallel = tensor_parallel
        self._failure: TransportError | None = None
        self._device = torch.device("cpu")  # of the step's tensors: NCCL takes no others

    async def dispatch(
        self,
        key: StepKey,
        layer_id: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        rows: Tensor | None = None,
    ) -> PendingExperts:
        """See `Experts.dispatch`; raises no TransportError, `settle` does."""
        self._device = hidden_states.device
        inner: PendingExperts | None = None
        if self._failure is None:
            try:
                inner = await self._experts.dispatch(
                    key, layer_id, hidden_states, topk_ids, topk_weights, rows
                )
            except TransportError as error:
                self._failure = error
        return _PendingGroup(self, inner, hidden_states)

    async def combine(self, inner: PendingExperts | None, hidden_states: Tensor) -> Combined:
        if inner is not None:
            try:
                return await inner.combine()
            except TransportError as error:
                self._failure = self._failure or error
        sizes = even_parts(hidden_states.shape[0], self._tensor_parallel.size)
        own = hidden_states.new_zeros((sizes[self._tensor_parallel.rank], *hidden_states.shape[1:]))
        return Combined(self._tensor_parallel.all_gather(own, sizes), ExpertTimes())

    def settle(self, lost: Mapping[int, str], num_slices: int) -> Mapping[int, str]:
        """Once per step, on every rank: `lost` slices of this rank become those of all. The reason
        is this rank's own, or the first of another. Raises AgreedTransportError on all or on
        none."""
        failure, self._failure = self._failure, None
        flags = torch.zeros(1 + num_slices, device=self._device)
        flags[0] = failure is not None
        for index in lost:
            flags[1 + index] = 1.0
        flags = self._tensor_parallel.all_reduce(flags)
        if not flags.any().item():
            return {}
        failed = bool(flags[0].item())
        told: TransportError | None = failure
        if lost and not failed:
            told = PeerLostError(next(iter(lost.values())))
        parts = self._tensor_parallel.all_gather(
            _encode(told).to(self._device), [1] * self._tensor_parallel.size
        )  # [tp_size, MESSAGE_BYTES]
        first = next(error for error in map(_decode, parts) if error is not None)
        if failed:
            raise first
        return {index: lost.get(index, str(first)) for index in flags[1:].nonzero()[:, 0].tolist()}


class GroupRunner:
    """A StepRunner of one rank in a group; `publish` is None on the ranks that follow, whose steps
    `observer` is told of. The leader's engine tells of its own."""

    def __init__(
        self,
        runner: StepRunner,
        experts: GroupExperts,
        publish: Callable[[StepPlan], Awaitable[None]] | None,
        observer: EngineObserver | None = None,
    ) -> None:
        self._runner = runner
        self._experts = experts
        self._publish = publish
        self._observer = observer

    async def execute(self, plan: StepPlan) -> StepResult:
        """See `StepRunner.execute`; a failed step raises AgreedTransportError on all ranks."""
        if self._publish is not None:
            await self._publish(plan)
        result = await self._runner.execute(plan)
        lost = self._experts.settle(result.lost, len(plan.slices))
        return replace(result, lost=lost) if lost else result

    async def follow(self, plan: StepPlan) -> None:
        """Execute one of the leader's plans. A step that the experts failed is the leader's to
        report, and this rank goes on with the next."""
        started = time.perf_counter()
        try:
            result = await self.execute(plan)
        except AgreedTransportError as error:
            log.warning("the experts failed a step", step=plan.step, error=str(error))
            return
        if self._observer is not None:
            times = replace(result.times, step_s=time.perf_counter() - started)
            self._observer.stepped(plan.step, (), times)


class _PendingGroup:
    def __init__(
        self, group: GroupExperts, inner: PendingExperts | None, hidden_states: Tensor
    ) -> None:
        self._group = group
        self._inner = inner
        self._hidden_states = hidden_states

    async def combine(self) -> Combined:
        return await self._group.combine(self._inner, self._hidden_states)

    def release(self) -> None:
        if self._inner is not None:
            self._inner.release()


def _encode(failure: TransportError | None) -> Tensor:
    """[1, MESSAGE_BYTES] uint8, spaces behind the text; all spaces where nothing failed."""
    text = b""
    if failure is not None:
        code, message = failure.code, str(failure)
        while len(text := json.dumps([code, message]).encode()) > MESSAGE_BYTES:
            message = message[: len(message) // 2]
    return torch.tensor([list(text.ljust(MESSAGE_BYTES))], dtype=torch.uint8)


def _decode(part: Tensor) -> AgreedTransportError | None:
    text = bytes(part.tolist()).strip()
    if not text:
        return None
    code, message = json.loads(text)
    return AgreedTransportError(code, message)
