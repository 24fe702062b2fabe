"""A model runner over a decoder that records: layers 1 and 2 have experts, layer 0 is dense.

A micro-batch is told by its first token. Knows neither attention nor experts.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from attn_service.experts import Combined, Experts, ExpertTimes, LostRows, PendingExperts, StepKey
from attn_service.model_runner import ModelRunner
from attn_service.sequence import SequenceSlice, StepPlan
from moe_core.errors import PeerLostError, UnavailableError

CPU = torch.device("cpu")
ANSWER_S = 0.005
MOE_LAYERS = (1, 2)


@dataclass
class Journal:
    """outstanding: dispatches, as (layer, micro-batch), neither combined nor released."""

    events: list[str] = field(default_factory=list)
    outstanding: set[tuple[int, int]] = field(default_factory=set)

    def note(self, what: str, layer_id: int, microbatch: int) -> None:
        self.events.append(f"{what} {layer_id}.{microbatch}")


class FakeLayer:
    def __init__(self, layer_id: int, journal: Journal, tp: "FakeGroup") -> None:
        self.layer_id = layer_id
        self.dtype = torch.float32
        self.is_moe = layer_id in MOE_LAYERS
        self.fails_in_shared = False
        self._journal = journal
        self._tp = tp

    def attend(self, hidden: Tensor, batch: object, cache: object) -> tuple[Tensor, Tensor]:
        self._journal.note("attend", self.layer_id, int(hidden[0, 1]))
        return self._tp.all_reduce(hidden), hidden

    def dense(self, residual: Tensor, hidden: Tensor) -> Tensor:
        return residual

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden.long(), hidden

    def shared(self, hidden: Tensor) -> None:
        if self.fails_in_shared:
            raise UnavailableError("the group is lost")

    def finish(self, residual: Tensor, routed: Tensor, shared: None) -> Tensor:
        return routed


class FakeDecoder:
    """hidden rows are (token, micro-batch); a layer's experts add 100 to the token."""

    def __init__(self, journal: Journal, tp: "FakeGroup") -> None:
        self.layers = [FakeLayer(layer_id, journal, tp) for layer_id in range(3)]
        self._embedded = 0

    def embed(self, token_ids: Tensor) -> Tensor:
        microbatch = torch.full_like(token_ids, self._embedded)
        self._embedded += 1
        return torch.stack((token_ids, microbatch), dim=1).double()

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


class FakeExperts:
    """Answers ANSWER_S after the dispatch, except what `fails` names: "dispatch 2.1", say, and
    the rows that `loses` names by layer and micro-batch. asked: the rows of each dispatch."""

    def __init__(
        self,
        journal: Journal,
        fails: str = "",
        loses: dict[tuple[int, int], tuple[int, ...]] | None = None,
    ) -> None:
        self._journal = journal
        self._fails = fails
        self.loses = loses or {}
        self.asked: dict[tuple[int, int], list[int] | None] = {}

    async def dispatch(
        self,
        key: StepKey,
        layer_id: int,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        rows: Tensor | None = None,
    ) -> PendingExperts:
        self.fail_if_named("dispatch", layer_id, key.microbatch)
        self._journal.note("dispatch", layer_id, key.microbatch)
        self._journal.outstanding.add((layer_id, key.microbatch))
        self.asked[layer_id, key.microbatch] = None if rows is None else rows.tolist()
        return FakePending(self, self._journal, (layer_id, key.microbatch), hidden)

    def fail_if_named(self, what: str, layer_id: int, microbatch: int) -> None:
        if self._fails == f"{what} {layer_id}.{microbatch}":
            raise PeerLostError(f"expert 0 is gone: layer {layer_id}")


class FakePending:
    def __init__(
        self, experts: FakeExperts, journal: Journal, which: tuple[int, int], hidden: Tensor
    ) -> None:
        self._experts = experts
        self._journal = journal
        self._which = which
        self._answer = hidden + torch.tensor([100.0, 0.0])
        lost = experts.loses.get(which, ())
        reason = f"layer {which[0]} has no experts"
        self._lost = (LostRows(torch.tensor(lost), reason),) if lost else ()
        self._ready_at = asyncio.get_running_loop().time() + ANSWER_S

    async def combine(self) -> Combined:
        try:
            await asyncio.sleep(max(0.0, self._ready_at - asyncio.get_running_loop().time()))
            self._experts.fail_if_named("answer", *self._which)
        finally:
            self._journal.outstanding.remove(self._which)
        self._journal.note("answer", *self._which)
        return Combined(self._answer, ExpertTimes(0.5, 0.25, 0.125, 0.0625), self._lost)

    def release(self) -> None:
        self._journal.outstanding.discard(self._which)


class FakeGroup:
    """This rank's view of a group of two; what it would wait for, it makes up."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def all_reduce(self, x: Tensor) -> Tensor:
        self.calls.append(("all_reduce", tuple(x.shape)))
        return x

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        self.calls.append(("all_gather", tuple(sizes)))
        return x.new_zeros((sum(sizes), *x.shape[1:]))


def runner_of(journal: Journal, experts: Experts, tp: FakeGroup | None = None) -> ModelRunner:
    decoder = FakeDecoder(journal, tp or FakeGroup())
    return ModelRunner(decoder, SimpleNamespace(block_size=4, layers=()), experts, CPU)  # type: ignore[arg-type]


def plan(num_microbatches: int, *tokens: tuple[int, ...], without_logits: int = -1) -> StepPlan:
    parts = tuple(
        SequenceSlice(each, 0, tuple(range(10)), needs_logits=index != without_logits)
        for index, each in enumerate(tokens)
    )
    return StepPlan(1, 0, parts, num_microbatches)
