"""Links to expert processes that compute something simple, and fail when and how they are told.

A process's partial for a row is `weight * factor(expert) * hidden`, summed over its columns and
shared out over the shards of its group, so a sum tells which experts are in it, and how often.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attn_service.expert_client import ExpertClient
from attn_service.experts import Combined, StepKey
from attn_service.peers import Peers
from attn_service.placements import Placements
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import PeerFailedError, PeerLostError, PeerTimeoutError, TransportError
from moe_core.model.tensor_parallel import NoTensorParallel, TensorParallel
from moe_core.placement import ExpertPlacement
from moe_core.transport.base import Combine, Dispatch, ExpertLink, LinkCounters
from support.expert_tier import CPU, Routing

LAYER = 1
SHARED_FACTOR = 1000.0


def factor(expert: int) -> float:
    return float(2**expert)


class FakeAnswer:
    def __init__(self, link: "FakeLink", dispatch: Dispatch) -> None:
        self.link = link
        self.dispatch = dispatch
        self.outcome: Combine | TransportError | None = None
        self.owed = True
        self.releases = 0
        self.changed = asyncio.Event()

    @property
    def done(self) -> bool:
        return self.outcome is not None

    def finish(self, outcome: Combine | TransportError) -> None:
        """What the peer says, or that it says nothing any more."""
        self.owed = False
        if self.outcome is None:
            self.outcome = outcome
            self.changed.set()

    async def left(self, timeout_s: float) -> None:
        if self.link.fails == "leaving":
            self.link.die()
            raise self.link.lost_error()

    async def settled(self, timeout_s: float) -> bool:
        if self.link.fails == "waiting":
            self.link.die()
        if not self.done:
            try:
                async with asyncio.timeout(timeout_s):
                    await self.changed.wait()
            except TimeoutError:
                return False
        return True

    def answered_chunks(self) -> None:
        return None

    def result(self) -> Combine:
        assert self.outcome is not None
        if isinstance(self.outcome, Combine):
            return self.outcome
        raise self.outcome

    async def wait(self, timeout_s: float) -> Combine:
        if not await self.settled(timeout_s):
            self.outcome = PeerTimeoutError(f"{self.link.peer} is slow, phase: compute")
        return self.result()

    def release(self) -> None:
        self.releases += 1
        if self.outcome is None:
            self.outcome = PeerLostError("not wanted")


@dataclass
class Tier:
    """A whole expert tier of fakes and a client over it."""

    model: ModelConfig
    parallel: ParallelConfig
    hedge_after_s: float | None = None
    wait_s: float = 5.0
    tensor_parallel: TensorParallel = field(default_factory=NoTensorParallel)

    def __post_init__(self) -> None:
        self.placement = ExpertPlacement.initial(self.model, self.parallel)
        self.links = [FakeLink(self, rank) for rank in range(self.parallel.expert_devices)]
        self.peers = Peers(self.parallel.etp_size, self.links)
        self.placements = Placements(self.placement, CPU)
        self.client = ExpertClient(
            self.peers,
            self.parallel,
            self.placements,
            self.tensor_parallel,
            expert_wait_s=self.wait_s,
            hedge_after_s=self.hedge_after_s,
        )

    async def run(self, routing: Routing, rows: Tensor | None = None, step: int = 0) -> Combined:
        pending = await self.client.dispatch(
            StepKey(0, step), LAYER, routing.hidden, routing.topk_ids, routing.topk_weights, rows
        )
        return await pending.combine()

    def expected(self, routing: Routing) -> Tensor:
        factors = [[factor(e) for e in row] for row in routing.topk_ids.tolist()]
        scale = torch.tensor(factors, dtype=torch.float64) * routing.topk_weights
        total = scale.sum(1, keepdim=True)
        if self.parallel.shared_on_experts:
            total = total + SHARED_FACTOR
        return routing.hidden * total.to(routing.hidden.dtype)

    @property
    def answers(self) -> list[FakeAnswer]:
        return [answer for link in self.links for answer in link.posted]

    def unreleased(self) -> list[str]:
        return [f"{a.link.peer}: {a.dispatch.key}" for a in self.answers if not a.releases]


class FakeLink(ExpertLink):
    """fails: "posting", "leaving", "waiting" (the process is lost then), "refusing" (it answers
    with an error), "slow" (it says nothing until `answer_all`), "full" (no slot is free) or
    nothing."""

    transport = "fake"

    def __init__(self, tier: Tier, rank: int) -> None:
        self.peer = f"expert {rank}"
        self.counters = LinkCounters()
        self.fails = ""
        self.posted: list[FakeAnswer] = []
        self.queue_us = 0
        self._tier = tier
        self._rank = rank
        self._lost: str | None = None

    @property
    def lost_because(self) -> str | None:
        return self._lost

    def die(self) -> None:
        self.lose("killed")

    def lose(self, reason: str) -> None:
        self._lost = reason
        for answer in self.posted:
            answer.finish(self.lost_error())

    def lost_error(self) -> PeerLostError:
        return PeerLostError(f"{self.peer} is gone (killed)")

    def try_dispatch(self, dispatch: Dispatch) -> FakeAnswer | None:
        if self.fails == "posting":
            self.die()
        if self._lost is not None or self.fails == "full":
            return None
        tensors = (tensor.clone() for tensor in dispatch[1:])
        answer = FakeAnswer(self, Dispatch(dispatch.key, *tensors))
        self.posted.append(answer)
        if self.fails == "refusing":
            answer.finish(PeerFailedError(f"{self.peer}: cannot", "INTERNAL"))
        elif self.fails not in ("slow", "leaving", "waiting"):
            self.answer(answer)
        return answer

    async def dispatch(self, dispatch: Dispatch, timeout_s: float) -> FakeAnswer:
        answer = self.try_dispatch(dispatch)
        if answer is not None:
            return answer
        if self._lost is not None:
            raise self.lost_error()
        await asyncio.sleep(timeout_s)
        raise PeerTimeoutError(f"{self.peer} has no free slot, phase: queue")

    def answer_all(self) -> None:
        for answer in self.posted:
            self.answer(answer)

    def answer(self, answer: FakeAnswer) -> None:
        answer.finish(
            Combine(answer.dispatch.key, self._partial(answer.dispatch), self.queue_us, 0)
        )

    def _partial(self, dispatch: Dispatch) -> Tensor:
        layer = self._tier.placement.layer(dispatch.key.layer_id)
        etp_size = self._tier.parallel.etp_size
        group = self._rank // etp_size

        def factor_of(physical: int) -> float:
            if physical < 0:
                return 0.0
            if physical == layer.shared_physical_id(group):
                return SHARED_FACTOR
            assert layer.physical_to_ep_rank[physical] == group
            return factor(layer.physical_to_logical[physical])

        factors = [[factor_of(each) for each in row] for row in dispatch.physical_ids.tolist()]
        ids = dispatch.physical_ids.shape
        scale = torch.tensor(factors, dtype=torch.float64).view(ids) * dispatch.topk_weights
        hidden = dispatch.hidden_states
        return hidden * (scale.sum(1, keepdim=True) / etp_size).to(hidden.dtype)

    async def close(self) -> None: ...


def rows_sent(links: Sequence[FakeLink], attempt: int) -> dict[int, list[list[int]]]:
    """By rank: the physical ids of the rows that a process was sent in one attempt."""
    return {
        rank: [
            [p for p in row if p >= 0]
            for answer in link.posted
            if answer.dispatch.key.attempt == attempt
            for row in answer.dispatch.physical_ids.tolist()
        ]
        for rank, link in enumerate(links)
    }
