"""AttentionService.Serve over a real grpc.aio server, with an engine that runs no model."""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, create_subprocess_exec
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from attn_service.engine import Engine
from attn_service.kv_blocks import BlockPool
from attn_service.scheduler import SchedulerConfig
from attn_service.servicer import SERVICE_NAME, AttentionServicer, add_to_server
from moe_core.errors import PeerLostError
from moe_core.pb.epserve.v1 import attention_pb2 as pb
from moe_core.pb.epserve.v1.attention_pb2_grpc import AttentionServiceStub
from moe_core.service.grpc_channel import open_channel
from moe_core.service.grpc_host import GrpcHost
from support import lost_gateway
from support.fake_runner import VOCAB, FakeRunner, continuation

TIMEOUT_S = 10.0
NUM_BLOCKS = 32
ROOT = Path(__file__).parents[2]


def add(name: str, *prompt: int, max_tokens: int = 6) -> pb.EngineRequest:
    sampling = pb.EngineSampling(max_tokens=max_tokens, top_p=1.0)
    return pb.EngineRequest(
        add=pb.AddSequence(sequence_id=name, prompt_ids=prompt, sampling=sampling)
    )


def abort(name: str) -> pb.EngineRequest:
    return pb.EngineRequest(abort=pb.AbortSequence(sequence_id=name))


@dataclass
class Service:
    engine: Engine
    runner: FakeRunner
    address: str
    stub: Any

    async def until_all_blocks_are_free(self) -> None:
        while self.engine.load.free_kv_blocks < NUM_BLOCKS:
            await asyncio.sleep(0.005)


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with serving() as started:
        yield started


@asynccontextmanager
async def serving(orphan_grace_s: float = 5.0) -> AsyncIterator[Service]:
    runner = FakeRunner()
    engine = Engine(
        runner,
        BlockPool(NUM_BLOCKS, runner.block_size),
        SchedulerConfig(max_num_seqs=4, max_step_tokens=8, max_model_len=64),
        vocab_size=VOCAB,
        placement_epoch=lambda: 0,
        orphan_grace_s=orphan_grace_s,
    )
    servicer = AttentionServicer()
    servicer.lead(engine.sequences)
    host = GrpcHost()
    host.add(add_to_server, servicer, SERVICE_NAME)
    port = await host.start("127.0.0.1", 0)
    address = f"127.0.0.1:{port}"
    channel = open_channel(address)
    running = asyncio.create_task(engine.run())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield Service(engine, runner, address, AttentionServiceStub(channel))
    finally:
        running.cancel()
        await asyncio.wait({running})
        await channel.close(None)
        await host.stop(0)


async def outputs_of(call: AsyncIterator[pb.StepOutput]) -> dict[str, tuple[list[int], str]]:
    tokens: dict[str, list[int]] = {}
    last: dict[str, str] = {}
    async for step in call:
        for output in step.outputs:
            tokens.setdefault(output.sequence_id, []).extend(output.token_ids)
            last[output.sequence_id] = output.error or output.finish_reason
    return {name: (tokens[name], last[name]) for name in tokens}


async def test_serve_answers_with_one_message_per_step(service: Service) -> None:
    call = service.stub.Serve(iter([add("a", 1, 2, 3), add("b", 9)]))
    assert await outputs_of(call) == {
        "a": (continuation((1, 2, 3), 6), "length"),
        "b": (continuation((9,), 6), "length"),
    }
    assert service.engine.load.free_kv_blocks == NUM_BLOCKS


async def test_abort_over_the_stream_frees_the_blocks(service: Service) -> None:
    service.runner.gate = asyncio.Event()
    call = service.stub.Serve()
    await call.write(add("a", 1, max_tokens=40))
    while not service.runner.plans:
        await asyncio.sleep(0.005)
    await call.write(abort("a"))
    while not service.engine.sequences._discarded:
        await asyncio.sleep(0.005)
    service.runner.gate.set()
    await call.done_writing()
    assert (await outputs_of(call))["a"] == ([], "abort")
    await service.until_all_blocks_are_free()


@pytest.mark.parametrize("how", ["the call", "the channel"])
async def test_a_lost_stream_frees_its_sequences_and_blocks_after_the_grace(how: str) -> None:
    async with serving(orphan_grace_s=0.1) as service:
        service.runner.gate = asyncio.Event()
        channel = open_channel(service.address)
        call = AttentionServiceStub(channel).Serve()
        for name in "abcdef":  # more than run at once
            await call.write(add(name, 1, 2, 3, max_tokens=40))
        while service.engine.load.num_waiting + service.engine.load.num_running < 6:
            await asyncio.sleep(0.005)
        if how == "the call":
            call.cancel()
        else:
            await channel.close(None)
        service.runner.gate.set()
        await service.until_all_blocks_are_free()
        while service.engine.load.num_waiting:
            await asyncio.sleep(0.005)
        # And the engine serves whoever comes next.
        assert await outputs_of(service.stub.Serve(iter([add("x", 7)]))) == {
            "x": (continuation((7,), 6), "length")
        }
        await channel.close(None)


async def test_a_killed_gateways_sequences_run_on_for_a_successor_and_then_are_freed() -> None:
    async with serving(orphan_grace_s=0.5) as service:
        service.runner.step_s = 0.02
        killed = await create_subprocess_exec(
            sys.executable, lost_gateway.__file__, service.address, "kept", "left",
            stdout=PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert killed.stdout is not None
        for _ in range(3):
            await killed.stdout.readline()
        killed.kill()
        await killed.wait()
        while not all(stream.is_lost for stream in service.engine.sequences._streams):
            await asyncio.sleep(0.005)
        found = await service.stub.Find(pb.FindRequest(sequence_ids=["kept", "left", "other"]))
        assert [each.sequence_id for each in found.sequences] == ["kept", "left"]
        again = add("kept", 1, 2, 3, max_tokens=40)
        again.add.take_over = True
        outputs = await outputs_of(service.stub.Serve(iter([again])))
        assert outputs == {"kept": (continuation((1, 2, 3), 40), "length")}
        await service.until_all_blocks_are_free()
        assert service.engine.counters.finished["abort"] == 1


async def test_a_stream_that_breaks_while_it_is_read_is_lost_too(service: Service) -> None:
    class Written:
        async def write(self, _message: object) -> None: ...

    async def requests() -> AsyncIterator[pb.EngineRequest]:
        yield add("a", 1, max_tokens=40)
        raise ConnectionResetError

    service.runner.step_s = 0.01
    servicer = AttentionServicer()
    servicer.lead(service.engine.sequences)
    with pytest.raises(ConnectionResetError):
        await servicer.Serve(requests(), Written())
    known = service.engine.sequences.find("a")
    assert known is not None
    assert known.holder is not None
    assert known.holder.is_lost


async def test_what_can_not_be_served_is_refused_on_the_stream_by_name(service: Service) -> None:
    requests = [add("long", 1, max_tokens=64), add("wrong", VOCAB), add("empty"), add("good", 1)]
    outputs = await outputs_of(service.stub.Serve(iter(requests)))
    assert "make 65 tokens, but the context holds 64" in outputs["long"][1]
    assert "token id 32 is outside the vocabulary of 32" in outputs["wrong"][1]
    assert "prompt of 0 tokens" in outputs["empty"][1]
    assert outputs["good"] == (continuation((1,), 6), "length")


async def test_priority_and_cached_tokens_cross_the_wire(service: Service) -> None:
    service.runner.gate = asyncio.Event()
    call = service.stub.Serve()
    for name, priority in [("a", 0), ("b", 0), ("c", 0), ("d", 0), ("late", 1), ("urgent", -1)]:
        request = add(name, 1, 2, 3, 4, 5, max_tokens=1)
        request.add.priority = priority
        await call.write(request)
    await call.done_writing()
    while sum((service.engine.load.num_waiting, service.engine.load.num_running)) < 6:
        await asyncio.sleep(0.005)
    service.runner.gate.set()
    outputs = [output async for step in call for output in step.outputs]
    names = [output.sequence_id for output in outputs]
    assert names.index("urgent") < names.index("late") == 5
    cached = {output.sequence_id: output.num_cached_tokens for output in outputs}
    assert cached == {"a": 0, "b": 4, "c": 4, "d": 4, "late": 4, "urgent": 4}


async def test_a_failed_step_is_told_with_code_and_cause_and_later_requests_work(
    service: Service,
) -> None:
    service.runner.fail_next = PeerLostError("expert 1 is gone: layer 2")
    call = service.stub.Serve()
    await call.write(add("a", 1))
    answers = aiter(call)
    (output,) = (await anext(answers)).outputs
    assert (output.finish_reason, output.error_code) == ("error", "UNAVAILABLE")
    assert output.error == "expert 1 is gone: layer 2"
    await call.write(add("a", 1))
    await call.done_writing()
    assert (await outputs_of(answers))["a"] == (continuation((1,), 6), "length")


async def test_an_empty_request_ends_the_stream_with_invalid_argument(service: Service) -> None:
    await expect_status(
        service.stub.Serve(iter([add("a", 1, max_tokens=40), pb.EngineRequest()])),
        grpc.StatusCode.INVALID_ARGUMENT,
        "none of add, abort and park",
    )
    await service.until_all_blocks_are_free()


async def test_follow_is_refused_where_nobody_may_follow(service: Service) -> None:
    await expect_status(
        service.stub.Follow(iter([pb.FollowRequest(tp_rank=1)])),
        grpc.StatusCode.INVALID_ARGUMENT,
        "alone in its group",
    )


async def expect_status(call: AsyncIterator[object], code: grpc.StatusCode, words: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await _exhaust(call)
    assert raised.value.code() is code
    assert words in raised.value.details()


async def _exhaust(call: AsyncIterator[object]) -> None:
    async for _ in call:
        pass


async def test_a_stopped_engine_fails_its_streams(service: Service) -> None:
    async def broken(_plan: object) -> None:
        raise RuntimeError("a mistake of ours")

    service.runner.execute = broken
    call = service.stub.Serve()
    await call.write(add("a", 1))
    answers = aiter(call)
    (output,) = (await anext(answers)).outputs
    assert (output.error_code, output.error) == (
        "INTERNAL",
        "internal error: RuntimeError: a mistake of ours",
    )
    await expect_status(answers, grpc.StatusCode.UNAVAILABLE, "the engine has stopped")
    await expect_status(
        service.stub.Serve(iter([add("a", 1)])),
        grpc.StatusCode.UNAVAILABLE,
        "the engine has stopped",
    )
