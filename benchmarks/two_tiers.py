"""Decode through two tiers against the same engine in one process, as a ratio in one run.

    python benchmarks/make_checkpoint.py /tmp/comparison
    python benchmarks/two_tiers.py /tmp/comparison

One side is `epserve serve` with one attention and one expert process, driven through its public
gRPC interface; the other is benchmarks/one_process.py. Both stay up and take turns, so that
the machine's drift hits both. Prints medians, and one JSON line.
"""

import argparse
import asyncio
import json
import statistics
from pathlib import Path

from child import Child
from decode_rate import DecodeRate, random_prompts
from epserve.client import EpserveClient
from epserve.cluster_settings import ClusterSettings
from epserve.generate_messages import Sampling
from epserve.launch_plan import make_plan
from epserve.local_cluster import running_cluster

PROMPT_TOKENS, NUM_TOKENS = 128, 64


async def decode_two_tiers(client: EpserveClient, vocab_size: int, batch: int) -> float:
    """The work of one_process.py, as concurrent requests to the gateway."""
    rate = DecodeRate(batch)
    sampling = Sampling(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)

    async def one(row: int, prompt: list[int]) -> None:
        async for output in client.generate(prompt, sampling):
            rate.arrived(row, len(output.token_ids))

    prompts = random_prompts(batch, PROMPT_TOKENS, vocab_size)
    async with asyncio.TaskGroup() as group:
        for row, prompt in enumerate(prompts):
            group.create_task(one(row, prompt))
    return rate.tokens_per_s


async def measure(
    directory: Path, transport: str, device: str, batches: list[int], rounds: int
) -> None:
    settings = ClusterSettings(
        model=directory, transport=transport, device=device, kv_cache_tokens=8192
    )
    plan = make_plan(settings)
    one = await asyncio.to_thread(Child, "one_process.py", str(directory), device)
    vocab_size = plan.model.vocab_size
    try:
        async with running_cluster(plan, lambda *_: None, lambda _: None, grace_s=10.0) as cluster:
            await decode_two_tiers(cluster.client, vocab_size, 2)
            await asyncio.to_thread(one.decode, 2, PROMPT_TOKENS, NUM_TOKENS)
            for batch in batches:
                pairs = [
                    (
                        await asyncio.to_thread(one.decode, batch, PROMPT_TOKENS, NUM_TOKENS),
                        await decode_two_tiers(cluster.client, vocab_size, batch),
                    )
                    for _ in range(rounds)
                ]
                report(batch, transport, pairs)
    finally:
        one.close()


def report(batch: int, transport: str, pairs: list[tuple[float, float]]) -> None:
    in_one, in_two = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(two / one for one, two in pairs)
    print(
        f"batch {batch:3}: one process {in_one:6.1f} tokens/s, two tiers {in_two:6.1f}, {ratio:.2f}"
    )
    print(
        json.dumps({"batch": batch, "transport": transport, "pairs": pairs, "median_ratio": ratio}),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--transport", default="nixl")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    batches = [int(batch) for batch in options.batches.split(",")]
    asyncio.run(
        measure(options.directory, options.transport, options.device, batches, options.rounds)
    )


if __name__ == "__main__":
    main()
