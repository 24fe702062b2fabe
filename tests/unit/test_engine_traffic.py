"""The engine under random traffic, over a runner whose KV slots know whose tokens they hold.

Every sequence must get the continuation of its own tokens, whoever else comes, is preempted,
shares its prompt, is aborted or fails beside it. FakeRunner checks each read and write.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from attn_service.engine import Engine
from attn_service.engine_stream import EngineStream
from attn_service.kv_blocks import BlockPool
from attn_service.scheduler import SchedulerConfig
from attn_service.sequence import FinishReason, Sampling, SequenceRequest
from moe_core.errors import PeerLostError, RequestError
from support.fake_runner import VOCAB, FakeRunner, continuation

TIMEOUT_S = 30.0
FAILED = "an expert is gone"


@dataclass
class Traffic:
    engine: Engine
    runner: FakeRunner
    stream: EngineStream
    requests: dict[str, SequenceRequest] = field(default_factory=dict)

    async def play(self, action: str, numbers: list[int]) -> None:
        if action == "add":
            self.add(*numbers)
        elif action == "abort" and self.requests:
            self.stream.abort(list(self.requests)[numbers[0] % len(self.requests)])
        elif action == "fail":
            self.runner.fail_next = PeerLostError(FAILED)
        elif action == "wait":
            for _ in range(numbers[0]):
                await asyncio.sleep(0)

    def add(self, base: int, length: int, copies: int, outputs: int, priority: int) -> None:
        prompt = (*((base, base + 1) * 20)[:length], length % VOCAB)
        for _ in range(copies):
            name = str(len(self.requests))
            request = SequenceRequest(name, prompt, Sampling(max_tokens=outputs), priority=priority)
            try:
                self.stream.add(request)
            except RequestError:
                return
            self.requests[name] = request

    async def results(self) -> dict[str, tuple[list[int], FinishReason, str]]:
        tokens: dict[str, list[int]] = {name: [] for name in self.requests}
        last: dict[str, tuple[FinishReason, str]] = {}
        self.stream.end_of_requests()
        async for step in self.stream.outputs():
            for output in step.outputs:
                tokens[output.sequence_id] += output.token_ids
                if output.finish_reason is not None:
                    last[output.sequence_id] = output.finish_reason, output.error
        return {name: (tokens[name], *last[name]) for name in self.requests}


async def play(actions: list[tuple], num_blocks: int, block_size: int) -> None:
    runner = FakeRunner(block_size)
    pool = BlockPool(num_blocks, block_size)
    config = SchedulerConfig(4, 7, max_model_len=64, growth_blocks=0)
    engine = Engine(runner, pool, config, vocab_size=VOCAB, placement_epoch=lambda: 0)
    running = asyncio.create_task(engine.run())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            traffic = Traffic(engine, runner, engine.sequences.open_stream())
            for action, *numbers in actions:
                await traffic.play(action, numbers)
            results = await traffic.results()
            while engine.load.num_running + engine.load.num_waiting:  # aborted ones may be left
                await asyncio.sleep(0)
    finally:
        running.cancel()
        await asyncio.wait({running})
    for name, result in results.items():
        _check(traffic.requests[name], *result)
    assert engine.load.free_kv_blocks == num_blocks
    assert sum(engine.counters.finished.values()) == len(results)


def _check(request: SequenceRequest, tokens: list[int], reason: FinishReason, error: str) -> None:
    expected = continuation(request.prompt_ids, request.sampling.max_tokens)
    if reason is FinishReason.LENGTH:
        assert tokens == expected
    elif reason is FinishReason.ERROR:
        assert (tokens, error) == (expected[: len(tokens)], FAILED)
    else:
        assert reason is FinishReason.ABORT
        assert tokens == expected[: len(tokens)]


ADD = st.tuples(
    st.just("add"),
    st.integers(0, 3),
    st.integers(0, 40),
    st.integers(1, 3),
    st.integers(1, 20),
    st.sampled_from([0, 0, 1]),
)
ACTIONS = st.one_of(
    ADD,
    ADD,
    st.tuples(st.just("wait"), st.integers(1, 30)),
    st.tuples(st.just("abort"), st.integers(0, 10**6)),
    st.tuples(st.just("fail")),
)


@given(
    actions=st.lists(ACTIONS, max_size=30),
    num_blocks=st.integers(3, 20),
    block_size=st.sampled_from([1, 4, 16]),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_sequence_reads_exactly_its_own_tokens(
    actions: list[tuple], num_blocks: int, block_size: int
) -> None:
    asyncio.run(play(actions, num_blocks, block_size))


def _dense() -> Iterator[tuple]:
    for number in range(80):
        yield "add", number % 4, number * 7 % 40, 1 + number % 3, 1 + number % 20, number % 2
        yield "wait", number % 11
        if number % 13 == 0:
            yield "abort", number


def test_dense_traffic_on_a_small_pool() -> None:
    asyncio.run(play(list(_dense()), num_blocks=16, block_size=4))
