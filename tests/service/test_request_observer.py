"""What whoever watches the gateway's requests is told, over real gRPC."""

import asyncio
from collections.abc import Sequence as Many

import grpc
import grpc.aio
import pytest

from gateway.observers import BothObservers, NoObserver, RequestWatch
from gateway.requests import Chunk, GenerationRequest, Sequence
from moe_core.cluster import Role
from moe_core.pb.epserve.v1 import gateway_pb2 as pb
from support.fake_attention import FakeAttention
from support.small_gateway import SmallGateway

DEADLINE_S = 10


class Notes:
    """An observer and a watch that writes down what it is told."""

    traceparent = "mine"

    def __init__(self) -> None:
        self.told: list[object] = []
        self.over = asyncio.Event()

    def watch(self, request: GenerationRequest) -> RequestWatch:
        self.told.append(request.traceparent)
        return self

    def admitted(self, choices: Many[Sequence], dp_rank: int) -> None:
        self.told.append(("admitted", len(choices), dp_rank))

    def moved(self, dp_rank: int) -> None:
        self.told.append(("moved", dp_rank))

    def queued(self, seconds: float) -> None:
        self.told.append(("queued", seconds))

    def put_out(self, chunk: Chunk) -> None:
        self.told.append((chunk.index, chunk.token_ids, chunk.finish_reason))

    def ended(self, error: BaseException | None) -> None:
        self.told.append(None if error is None else type(error).__name__)
        self.over.set()


def two_more(prompt: Many[int]) -> list[int]:
    return [prompt[-1] + 1, prompt[-1] + 2]


def request(ids: Many[int] = (5, 6), **sampling: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids), sampling=pb.SamplingParams(**sampling)
    )


async def test_moments_come_in_order_and_the_engine_gets_the_watchs_traceparent() -> None:
    notes = Notes()
    async with SmallGateway(observer=BothObservers(NoObserver(), notes)) as gateway:
        fake = FakeAttention(two_more)
        await gateway.add_worker(Role.ATTN, fake)
        call = gateway.stub.Generate(
            request(), timeout=DEADLINE_S, metadata=[("traceparent", "theirs")]
        )
        assert [token for answer in [a async for a in call] for token in answer.token_ids] == [7, 8]
    assert notes.told == [
        "theirs", ("admitted", 1, 0), (0, (7,), ""), (0, (8,), "length"), None,
    ]  # fmt: skip
    assert [added.traceparent for added in fake.added] == ["mine"]


async def test_refused_and_failed_requests_end_with_their_error() -> None:
    notes = Notes()
    async with SmallGateway(observer=notes) as gateway:
        fake = FakeAttention(two_more)
        await gateway.add_worker(Role.ATTN, fake)
        with pytest.raises(grpc.aio.AioRpcError):
            await gateway.stub.Generate(request(max_tokens=0), timeout=DEADLINE_S).read()
        assert notes.told == ["", "RequestError"]
        fake.error = ("UNAVAILABLE", "experts are gone")
        with pytest.raises(grpc.aio.AioRpcError):
            await gateway.stub.Generate(request(), timeout=DEADLINE_S).read()
    assert notes.told[2:] == ["", ("admitted", 1, 0), "UnavailableError"]


async def test_client_that_leaves_ends_the_watch_too() -> None:
    notes = Notes()
    async with SmallGateway(observer=notes) as gateway:
        await gateway.add_worker(Role.ATTN, FakeAttention(lambda prompt: [7] * 100, step_s=0.05))
        call = gateway.stub.Generate(request(), timeout=DEADLINE_S)
        await call.read()
        call.cancel()
        async with asyncio.timeout(5):
            await notes.over.wait()
    assert notes.told[-1] in ("CancelledError", "GeneratorExit")
