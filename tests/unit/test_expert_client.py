"""What the expert client does with its links: who is named, what is given up, what is ordered."""

import asyncio
from dataclasses import dataclass, field

import pytest
import torch

from attn_service.expert_client import ExpertClient
from attn_service.experts import Combined, StepKey
from attn_service.peers import Peers
from attn_service.placements import Placements
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import PeerFailedError, PeerLostError, PeerTimeoutError, TransportError
from moe_core.model.tensor_parallel import NoTensorParallel
from moe_core.placement import ExpertPlacement
from moe_core.transport.base import Combine, Dispatch, ExpertLink, LinkCounters
from support.expert_tier import CPU, random_routing
from support.moe_configs import moe_model

MODEL = moe_model(num_experts=8, top_k=2)
PARALLEL = ParallelConfig(expert_devices=3 + 1, ep_size=4).with_model(MODEL)
ROUTING = random_routing(MODEL, 3, torch.float32, 0)


@dataclass
class Journal:
    events: list[str] = field(default_factory=list)


class FakeAnswer:
    done = owed = False

    def __init__(self, link: "FakeLink", dispatch: Dispatch) -> None:
        self._link = link
        self._dispatch = dispatch

    async def settled(self, timeout_s: float) -> bool:
        self._link.journal.events.append(f"wait {self._link.peer}")
        await asyncio.sleep(timeout_s if self._link.answers_never else 0)
        self.done = not self._link.answers_never
        return self.done

    def answered_chunks(self) -> None:
        return None

    def result(self) -> Combine:
        if self._link.answer_error is not None:
            raise self._link.answer_error
        self._link.journal.events.append(f"consumed {self._link.peer}")
        partial = torch.full_like(self._dispatch.hidden_states, self._link.value)
        return Combine(self._dispatch.key, partial, *self._link.times_us)

    async def wait(self, timeout_s: float) -> Combine:
        if not self.done and not await self.settled(timeout_s):
            raise PeerTimeoutError(f"{self._link.peer} did not answer in {timeout_s} s")
        return self.result()

    async def left(self, timeout_s: float) -> None: ...

    def release(self) -> None:
        self._link.journal.events.append(f"release {self._link.peer}")


class FakeLink(ExpertLink):
    transport = "fake"
    lost_because = None

    def __init__(self, rank: int, journal: Journal) -> None:
        self.peer = f"expert {rank}"
        self.counters = LinkCounters()
        self.journal = journal
        self.value = float(rank)
        self.times_us = (0, 0)  # queue and compute
        self.post_error: Exception | None = None
        self.answer_error: Exception | None = None
        self.answers_never = False
        self.posts_never = False

    async def dispatch(self, dispatch: Dispatch, timeout_s: float) -> FakeAnswer:
        self.journal.events.append(f"post {self.peer}")
        await asyncio.sleep(0)
        if self.post_error is not None:
            raise self.post_error
        if self.posts_never:
            await asyncio.sleep(timeout_s)
            raise PeerTimeoutError(f"{self.peer} has no free slot")
        self.journal.events.append(f"left {self.peer}")
        return FakeAnswer(self, dispatch)

    def lose(self, reason: str) -> None: ...

    async def close(self) -> None: ...


@pytest.fixture
def links() -> list[FakeLink]:
    journal = Journal()
    return [FakeLink(rank, journal) for rank in range(4)]


def make_client(links: list[FakeLink], wait_s: float = 10.0) -> ExpertClient:
    placements = Placements(ExpertPlacement.initial(MODEL, PARALLEL), CPU)
    peers = Peers(PARALLEL.etp_size, links)
    return ExpertClient(peers, PARALLEL, placements, NoTensorParallel(), expert_wait_s=wait_s)


async def combined(client: ExpertClient) -> Combined:
    pending = await client.dispatch(
        StepKey(0, 0), 1, ROUTING.hidden, ROUTING.topk_ids, ROUTING.topk_weights
    )
    return await pending.combine()


async def exchange(client: ExpertClient) -> torch.Tensor:
    return (await combined(client)).hidden_states


async def test_all_bytes_have_left_before_any_answer_is_awaited(links: list[FakeLink]) -> None:
    total = await exchange(make_client(links))
    events = links[0].journal.events
    last_left = max(i for i, event in enumerate(events) if event.startswith("left"))
    first_wait = min(i for i, event in enumerate(events) if event.startswith("wait"))
    assert last_left < first_wait
    assert torch.equal(total, torch.full_like(ROUTING.hidden, 0 + 1 + 2 + 3))


async def test_the_times_are_those_of_the_slowest_process(links: list[FakeLink]) -> None:
    for link, times_us in zip(links, ((90, 10), (5, 400), (300, 100), (0, 1)), strict=True):
        link.times_us = times_us
    pending = await make_client(links).dispatch(
        StepKey(0, 0), 1, ROUTING.hidden, ROUTING.topk_ids, ROUTING.topk_weights
    )
    times = (await pending.combine()).times
    assert (times.queue_s, times.compute_s) == pytest.approx((5e-6, 400e-6))
    assert times.wait_s > 0
    assert times.combine_s > 0


async def test_an_answer_that_is_not_wanted_is_released(links: list[FakeLink]) -> None:
    pending = await make_client(links).dispatch(
        StepKey(0, 0), 1, ROUTING.hidden, ROUTING.topk_ids, ROUTING.topk_weights
    )
    pending.release()
    released = [event for event in links[0].journal.events if event.startswith("release")]
    assert released == [f"release expert {rank}" for rank in range(4)]


async def test_partials_are_added_in_ascending_rank_order(links: list[FakeLink]) -> None:
    """In float32 (1e8 + -1e8) + 0.5 + 1 is 1.5, and any order that adds 0.5 earlier is not."""
    for link, value in zip(links, (1e8, -1e8, 0.5, 1.0), strict=True):
        link.value = value
    total = await exchange(make_client(links))
    assert torch.equal(total, torch.full_like(ROUTING.hidden, 1.5))


@pytest.mark.parametrize(
    "error",
    [
        PeerLostError("expert 2 is gone"),
        PeerTimeoutError("expert 2 is slow"),
        PeerFailedError("expert 2: no", "INTERNAL"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("when", ["post_error", "answer_error"])
async def test_a_failure_names_peer_layer_and_experts(
    links: list[FakeLink], error: TransportError, when: str
) -> None:
    setattr(links[2], when, error)
    (lost,) = (await combined(make_client(links))).lost
    assert lost.reason.startswith(str(error))
    assert "(for layer 1, experts " in lost.reason


@pytest.mark.parametrize("when", ["post_error", "answer_error"])
async def test_after_a_failure_every_posted_dispatch_is_released(
    links: list[FakeLink], when: str
) -> None:
    setattr(links[2], when, PeerLostError("expert 2 is gone"))
    assert (await combined(make_client(links))).lost
    events = links[0].journal.events
    left = {event.removeprefix("left ") for event in events if event.startswith("left")}
    released = [event.removeprefix("release ") for event in events if event.startswith("release")]
    assert left == set(released)


@pytest.mark.parametrize("what", ["answers_never", "posts_never"])
async def test_a_silent_peer_costs_no_more_than_the_deadline(
    links: list[FakeLink], what: str
) -> None:
    for link in links:
        setattr(link, what, True)
    loop = asyncio.get_running_loop()
    started = loop.time()
    lost = (await combined(make_client(links, wait_s=0.1))).lost
    assert loop.time() - started < 1.0
    assert all("(for layer 1, experts" in each.reason for each in lost)
    assert sorted({row for each in lost for row in each.rows.tolist()}) == [0, 1, 2]


async def test_cancelling_while_posting_leaves_no_task_and_no_dispatch_unreleased(
    links: list[FakeLink],
) -> None:
    links[3].posts_never = True
    before = asyncio.all_tasks()
    running = asyncio.create_task(exchange(make_client(links)))
    await asyncio.sleep(0.05)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert asyncio.all_tasks() == before
    released = [event for event in links[0].journal.events if event.startswith("release")]
    assert sorted(released) == ["release expert 0", "release expert 1", "release expert 2"]


async def test_a_mistake_that_is_no_transport_error_is_raised_as_it_is(
    links: list[FakeLink],
) -> None:
    links[0].post_error = ValueError("hidden_states do not fit")
    with pytest.raises(ValueError, match="do not fit"):
        await exchange(make_client(links))


async def test_processes_that_were_never_met_are_lost_ones(links: list[FakeLink]) -> None:
    client = make_client(links[:3])
    held = ExpertPlacement.initial(MODEL, PARALLEL).layer(1).logical_experts(3)
    (lost,) = (await combined(client)).lost
    assert lost.reason.startswith("layer 1 needs experts ")
    assert lost.reason.endswith("of expert 3 (not connected); no other process holds them")
    rows = [row for row, ids in enumerate(ROUTING.topk_ids.tolist()) if {*held} & {*ids}]
    assert lost.rows.tolist() == rows
