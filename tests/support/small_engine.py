"""A real engine over FakeRunner: small, with a scheduler whose limits a few tokens reach."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from attn_service.engine import Engine
from attn_service.kv_blocks import BlockPool
from attn_service.microbatches import ALWAYS_ONE, MicrobatchRule
from attn_service.scheduler import SchedulerConfig
from moe_core.config.expert_wait import DEFAULT_EXPERT_WAIT_S
from support.fake_runner import VOCAB, FakeRunner

MAX_MODEL_LEN = 64


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
    )
    task = asyncio.create_task(engine.run())
    try:
        yield engine
    finally:
        task.cancel()
        await asyncio.wait({task})
