"""Random traffic for the real engine over a tiny model: the requests, and shapes of an engine that
batch, cut, preempt, share and overlap them differently.

Knows what comes of each request, alone and among the others. Knows no expected token.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import torch

from attn_service.counters import EngineCounters
from attn_service.sequence import Sampling, SequenceRequest
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from support.local_engine import Generated, LocalEngine, collect, local_engine

NUM_REQUESTS = 220
VOCAB = 128
LEVEL_0 = ParallelConfig()
LEVEL_1 = ParallelConfig(expert_devices=2, ep_size=2)
LEVEL_2 = ParallelConfig(expert_devices=2, ep_size=2, expert_parallel_degree=2)


def traffic() -> list[SequenceRequest]:
    """Prompts that begin with one of a few system prompts, some in several copies, half of them
    greedy and half with a seed."""
    chance = random.Random(5)
    systems = [tuple(chance.choices(range(2, VOCAB), k=size)) for size in (0, 9, 20, 33)]
    requests: list[SequenceRequest] = []
    while len(requests) < NUM_REQUESTS:
        prompt = (*chance.choice(systems), *chance.choices(range(2, VOCAB), k=chance.randint(1, 9)))
        drawn = chance.random() < 0.5
        for index in range(chance.choice((1, 1, 1, 4))):
            sampling = Sampling(
                max_tokens=chance.randint(1, 14),
                temperature=0.8 if drawn else 0.0,
                top_p=0.95,
                seed=len(prompt) * 1000 + prompt[-1],
                index=index,
                repetition_penalty=1.3 if len(prompt) % 3 == 0 else 1.0,
            )
            priority = chance.choice((0, 0, 1))
            requests.append(
                SequenceRequest(str(len(requests)), prompt, sampling, priority=priority)
            )
    return requests


@dataclass(frozen=True)
class Shape:
    """Of the engine and of the arrivals: at most `burst` requests at once."""

    max_num_seqs: int
    max_step_tokens: int
    kv_cache_tokens: int
    burst: int
    block_size: int = 4
    parallel: ParallelConfig = LEVEL_0
    microbatches: str = "1"


SHAPES = {
    "wide": Shape(max_num_seqs=16, max_step_tokens=256, kv_cache_tokens=4096, burst=220),
    "short chunks": Shape(max_num_seqs=6, max_step_tokens=7, kv_cache_tokens=512, burst=12),
    "few blocks": Shape(
        max_num_seqs=12, max_step_tokens=32, kv_cache_tokens=64, burst=30, block_size=1
    ),
    "two experts": Shape(8, 24, 128, burst=9, parallel=LEVEL_2),
    "two micro-batches": Shape(8, 24, 96, burst=20, parallel=LEVEL_1, microbatches="2"),
    "three micro-batches": Shape(12, 32, 80, burst=30, parallel=LEVEL_2, microbatches="3"),
}


async def alone(
    directory: Path, dtype: torch.dtype
) -> AsyncIterator[tuple[SequenceRequest, Generated]]:
    """Every request by itself, its prompt in one step, in a block that is larger than it: nothing
    is batched, cut, preempted or shared."""
    async with local_engine(
        directory, LEVEL_0, dtype=dtype, block_size=64, kv_cache_tokens=64, max_num_seqs=1
    ) as local:
        for request in traffic():
            (generated,) = (await local.generate([request])).values()
            yield request, generated
        counters = local.engine.counters
    assert (counters.prefix_hit_tokens, counters.preemptions) == (0, 0)


async def play(
    local: LocalEngine, requests: list[SequenceRequest], burst: int
) -> dict[str, Generated]:
    """The requests in bursts of random size, each some steps after the last."""
    chance = random.Random(burst)
    stream = local.engine.sequences.open_stream()
    results = asyncio.create_task(collect(stream))
    while requests:
        size = chance.randint(1, burst)
        for request in requests[:size]:
            stream.add(request)
        requests = requests[size:]
        goal = local.engine.sequences.step + chance.randint(0, 12)
        while local.engine.sequences.step < goal and local.engine.load.num_running:
            await asyncio.sleep(0)
    stream.end_of_requests()
    return await results


async def among_others(
    directory: Path, shape: Shape, dtype: torch.dtype
) -> tuple[dict[str, Generated], EngineCounters]:
    """All requests in an engine of this shape, by id, and what it counted."""
    async with local_engine(
        directory,
        shape.parallel,
        dtype=dtype,
        block_size=shape.block_size,
        kv_cache_tokens=shape.kv_cache_tokens,
        max_num_seqs=shape.max_num_seqs,
        max_step_tokens=shape.max_step_tokens,
        microbatches=shape.microbatches,
    ) as local:
        results = await play(local, traffic(), shape.burst)
        layers = ModelConfig.from_hf(directory).moe_layer_ids
        _check_micro_batches(local, len(layers), shape)
        return results, local.engine.counters


def _check_micro_batches(local: LocalEngine, layers: int, shape: Shape) -> None:
    """A step sends an expert process one dispatch per micro-batch and MoE layer, at Level 2 at
    most, and a step of few sequences has few micro-batches."""
    dispatches = local.links[0].counters.dispatches
    steps = local.engine.metrics.steps
    assert (dispatches > 1.2 * steps * layers) is (shape.microbatches != "1")
