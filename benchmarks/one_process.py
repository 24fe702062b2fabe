"""The engine with both tiers in this process over `local`, decoding what its parent asks for.

Started by two_tiers.py, which reads one JSON answer a line for each line it writes:

    {"batch": 16, "prompt_tokens": 128, "num_tokens": 64}  →  {"tokens_per_s": 42.0}

Knows the engine's own interface; the cluster is two_tiers.py's.
"""

import asyncio
import json
import sys
from pathlib import Path

import torch
import uvloop

from attn_service.sequence import Sampling, SequenceRequest
from decode_rate import DecodeRate, random_prompts
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from support.local_engine import LocalEngine, local_engine


async def decode(
    local: LocalEngine, vocab_size: int, batch: int, prompt_tokens: int, num_tokens: int
) -> float:
    """Decode tokens/s of `batch` sequences of `num_tokens` greedy tokens each."""
    stream = local.engine.sequences.open_stream()
    for row, prompt in enumerate(random_prompts(batch, prompt_tokens, vocab_size)):
        stream.add(SequenceRequest(str(row), tuple(prompt), Sampling(max_tokens=num_tokens)))
    stream.end_of_requests()
    rate = DecodeRate(batch)
    async for step in stream.outputs():
        for output in step.outputs:
            if output.error:
                raise RuntimeError(output.error)
            rate.arrived(output.sequence_id, len(output.token_ids))
    return rate.tokens_per_s


async def main(directory: Path, device: torch.device) -> None:
    config = ModelConfig.from_hf(directory)
    dtype = getattr(torch, config.dtype)
    loop = asyncio.get_running_loop()
    async with local_engine(
        directory,
        ParallelConfig(),
        dtype=dtype,
        kv_cache_tokens=8192,
        max_step_tokens=512,
        device=device,
    ) as local:
        print(json.dumps({"ready": True}), flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            rate = await decode(local, config.vocab_size, **json.loads(line))
            print(json.dumps({"tokens_per_s": rate}), flush=True)


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1]), torch.device(sys.argv[2])))
