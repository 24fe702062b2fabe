"""A real engine over FakeRunner: small, with a scheduler whose limits a few tokens reach."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from attn_service.adoptions import KvFetcher
from attn_service.engine import Engine
from attn_service.engine_stream import EngineStream
from attn_service.kv_blocks import BlockPool
from attn_service.microbatches import ALWAYS_ONE, MicrobatchRule
from attn_service.scheduler import SchedulerConfig
from attn_service.sequence import SequenceOutput, SequenceRequest
from moe_core.config.expert_wait import DEFAULT_EXPERT_WAIT_S
from support.fake_runner import VOCAB, FakeRunner

MAX_MODEL_LEN = 64
TIMEOUT_S = 10.0


@asynccontextmanager
async def running_engine(
    runner: FakeRunner,
    *,
    budget: int = 8,
    num_blocks: int = 64,
    max_num_seqs: int = 4,
    placement_epoch: int = 0,
    expert_wait_s: float = DEFAULT_EXPERT_WAIT_S,
    microbatches: MicrobatchRule = ALWAYS_ONE,
    orphan_grace_s: float = 5.0,
    kv_fetcher: KvFetcher | None = None,
) -> AsyncIterator[Engine]:
    """`budget`: tokens of a step. The engine stops when the context is left."""
    engine = Engine(
        runner,
        BlockPool(num_blocks, runner.block_size),
        SchedulerConfig(max_num_seqs, budget, MAX_MODEL_LEN),
        vocab_size=VOCAB,
        placement_epoch=lambda: placement_epoch,
        expert_wait_s=expert_wait_s,
        microbatches=microbatches,
        orphan_grace_s=orphan_grace_s,
        kv_fetcher=kv_fetcher,
    )
    task = asyncio.create_task(engine.run())
    try:
        yield engine
    finally:
        task.cancel()
        await asyncio.wait({task})


async def outputs_of(engine: Engine, *requests: SequenceRequest) -> dict[str, list[SequenceOutput]]:
    stream = engine.sequences.open_stream()
    for request in requests:
        stream.add(request)
    stream.end_of_requests()
    outputs: dict[str, list[SequenceOutput]] = {request.sequence_id: [] for request in requests}
    async with asyncio.timeout(TIMEOUT_S):
        async for step in stream.outputs():
            for output in step.outputs:
                outputs[output.sequence_id].append(output)
    return outputs


async def collect(stream: EngineStream) -> dict[str, tuple[list[int], str]]:
    """Tokens and the last word (finish reason, or the error's text) per sequence."""
    tokens: dict[str, list[int]] = {}
    last: dict[str, str] = {}
    stream.end_of_requests()
    async for step in stream.outputs():
        for output in step.outputs:
            tokens.setdefault(output.sequence_id, []).extend(output.token_ids)
            last[output.sequence_id] = output.error or output.finish_reason or ""
    return {name: (tokens[name], last[name]) for name in tokens}
