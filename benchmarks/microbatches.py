"""A step in several micro-batches against the same step in one, as a ratio in one run.

    python benchmarks/make_checkpoint.py /tmp/comparison
    python benchmarks/microbatches.py /tmp/comparison

Both sides are `epserve serve` with one attention and one expert process, alike but for
--microbatches; both stay up and take turns, so that the machine's drift hits both. Two kinds of
work: prompts of 128 tokens with one output each (prefill), and of 16 with 24 outputs (decode).
Prints median rates, their ratio, and where the attention processes' steps spent their time.

With --own-cores each tier has one thread on a core of its own, as if on a device of its own.
Without, both tiers share all cores, and there is hardly an idle one for the overlap to use.
"""

import argparse
import asyncio
import json
import os
import statistics
import time
from contextlib import AsyncExitStack
from dataclasses import fields
from pathlib import Path

from decode_rate import DecodeRate, random_prompts
from epserve.client import EpserveClient
from epserve.cluster_settings import ClusterSettings
from epserve.generate_messages import Sampling
from epserve.launch_plan import make_plan
from epserve.local_cluster import running_cluster
from moe_core.cluster import EngineMetrics, Role

# Prompt and output tokens.
LENGTHS = {"prefill": (128, 1), "decode": (16, 24)}
REPORT_S = 1.2  # the attention process tells its totals twice a second
PARTS = tuple(field.name for field in fields(EngineMetrics) if field.name.endswith("_s"))


class Side:
    def __init__(self, name: str, client: EpserveClient, vocab_size: int) -> None:
        self.name = name
        self._client = client
        self._vocab_size = vocab_size
        self._prompts = 0

    async def rate(self, work: str, batch: int) -> float:
        """Tokens/s: of the prompts in "prefill", of the outputs in "decode"."""
        prompt_tokens, num_tokens = LENGTHS[work]
        sampling = Sampling(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        rate = DecodeRate(batch)

        async def one(row: int, prompt: list[int]) -> None:
            async for output in self._client.generate(prompt, sampling):
                rate.arrived(row, len(output.token_ids))

        self._prompts += batch  # no prompt twice: it would be in the cache
        prompts = random_prompts(self._prompts, prompt_tokens, self._vocab_size)[-batch:]
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for row, prompt in enumerate(prompts):
                group.create_task(one(row, prompt))
        if work == "decode":
            return rate.tokens_per_s
        return batch * prompt_tokens / (time.perf_counter() - started)

    async def metrics(self) -> EngineMetrics:
        await asyncio.sleep(REPORT_S)
        member = (await self._client.cluster()).tier(Role.ATTN)[0]
        assert member.engine_metrics is not None
        return member.engine_metrics


async def measure(options: argparse.Namespace) -> None:
    async with AsyncExitStack() as stack:
        sides = []
        for count in options.counts.split(","):
            plan = make_plan(
                ClusterSettings(
                    model=options.directory,
                    transport=options.transport,
                    dtype=options.dtype,
                    kv_cache_tokens=16384,
                    microbatches=count,
                )
            )
            cluster = await stack.enter_async_context(
                running_cluster(plan, lambda *_: None, lambda _: None, grace_s=10.0)
            )
            if options.own_cores:
                await give_own_cores(cluster.client)
            sides.append(Side(count, cluster.client, plan.model.vocab_size))
        for work, batch in (item.split(":") for item in options.work.split(",")):
            await compare(sides, work, int(batch), options.rounds)


async def give_own_cores(client: EpserveClient) -> None:
    cores = sorted(os.sched_getaffinity(0))
    for role, core in ((Role.ATTN, cores[0]), (Role.EXPERT, cores[1])):
        for member in (await client.cluster()).tier(role):
            pin(member.pid, core)


def pin(pid: int, core: int) -> None:
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


async def compare(sides: list[Side], work: str, batch: int, rounds: int) -> None:
    for side in sides:
        await side.rate(work, min(batch, 4))
    before = [await side.metrics() for side in sides]
    rates = [[await side.rate(work, batch) for side in sides] for _ in range(rounds)]
    after = [await side.metrics() for side in sides]
    for index, side in enumerate(sides):
        steps = after[index].steps - before[index].steps
        split = {
            name: round(1e3 * (getattr(after[index], name) - getattr(before[index], name)) / steps)
            for name in PARTS
        }
        median = statistics.median(row[index] for row in rates)
        ratio = statistics.median(row[index] / row[0] for row in rates)
        print(f"{work} {batch:3}, {side.name} micro-batches: {median:7.1f} tokens/s, {ratio:.2f}")
        line = {"work": work, "batch": batch, "microbatches": side.name, "ratio": ratio}
        print(json.dumps({**line, "ms_per_step": split}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--transport", default="nixl")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--counts", default="1,2")
    parser.add_argument("--work", default="prefill:4,prefill:16,decode:16,decode:48")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--own-cores", action="store_true")
    options = parser.parse_args()
    if options.own_cores:
        os.environ["OMP_NUM_THREADS"] = "1"  # the launcher keeps what is set
    asyncio.run(measure(options))


if __name__ == "__main__":
    main()
