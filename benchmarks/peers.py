"""Decode rates of epserve and of what people use today, as ratios in one run.

    python benchmarks/make_checkpoint.py /tmp/comparison
    python benchmarks/peers.py /tmp/comparison

Sides, which all stay up and take turns so that the machine's drift hits them alike:

* epserve in two tiers over NIXL (`epserve serve`), through its public gRPC interface;
* epserve's engine in one process over `local` (one_process.py);
* transformers.generate with the same batch, in the best of its dtypes and expert kernels;
* llama.cpp, with `--llama PYTHON FILE`: a Python that has llama-cpp-python, and the same weights in
  GGUF (make_gguf.py). Two commands make them:

    python -m venv llama && llama/bin/pip install llama-cpp-python==0.3.36 gguf
    python benchmarks/make_gguf.py /tmp/comparison /tmp/comparison.gguf

Prints medians of the rates, the median ratio of two tiers to each, and one JSON line per batch.
"""

import argparse
import asyncio
import json
import statistics
from collections.abc import Awaitable, Callable, Iterable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from child import Child
from epserve.cluster_settings import ClusterSettings
from epserve.launch_plan import make_plan
from epserve.local_cluster import running_cluster
from two_tiers import NUM_TOKENS, PROMPT_TOKENS, decode_two_tiers

TWO_TIERS = "two tiers"
TRIAL_TOKENS, SLOW_TOKENS = 3, 12  # of transformers: its rate is as steady with few
WORTH_A_TRIAL = 0.5  # of the best rate after prompts of TRIAL_TOKENS
GOALS = {  # of two tiers, by batch
    1: {"transformers": 2.5, "llama.cpp": 0.6, "one process": 0.85},
    16: {"transformers": 5.0, "llama.cpp": 0.9, "one process": 0.85},
}

Rate = Callable[[int], Awaitable[float]]


def in_thread(child: Child, batch: int) -> Awaitable[float]:
    return asyncio.to_thread(child.decode, batch, PROMPT_TOKENS, NUM_TOKENS)


class Transformers:
    """Finds out by trial, for each batch, which of the kinds is fastest: with prompts as they come,
    for those that short prompts leave in the running."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._best: dict[int, str] = {}

    async def rate(self, batch: int) -> float:
        if batch not in self._best:
            short = await self._trial(self._child.ready["kinds"], batch, TRIAL_TOKENS)
            worth = [kind for kind in short if short[kind] > WORTH_A_TRIAL * max(short.values())]
            rates = await self._trial(worth, batch, PROMPT_TOKENS)
            self._best[batch] = max(rates, key=rates.__getitem__)
        return await self._ask(self._best[batch], batch, PROMPT_TOKENS, SLOW_TOKENS)

    async def _trial(
        self, kinds: Iterable[str], batch: int, prompt_tokens: int
    ) -> dict[str, float]:
        rates = {kind: await self._ask(kind, batch, prompt_tokens, TRIAL_TOKENS) for kind in kinds}
        shown = ", ".join(f"{kind} {rate:.1f}" for kind, rate in rates.items())
        print(f"transformers, batch {batch}, prompts of {prompt_tokens}: {shown}", flush=True)
        return rates

    async def _ask(self, kind: str, batch: int, prompt_tokens: int, num_tokens: int) -> float:
        work = {"batch": batch, "prompt_tokens": prompt_tokens, "num_tokens": num_tokens}
        answer = await asyncio.to_thread(self._child.ask, kind=kind, **work)
        return float(answer["tokens_per_s"])


async def measure(
    directory: Path, llama: tuple[str, str] | None, batches: list[int], rounds: int
) -> None:
    settings = ClusterSettings(
        model=directory, transport="nixl", device="cpu", kv_cache_tokens=8192
    )
    plan = make_plan(settings)
    with ExitStack() as stack:
        children = {"one process": Child("one_process.py", str(directory), "cpu")}
        children["transformers"] = Child("peer_transformers.py", str(directory))
        if llama is not None:
            children["llama.cpp"] = Child("peer_llama.py", llama[1], python=llama[0])
        for child in children.values():
            stack.enter_context(closing(child))
        sides: dict[str, Rate] = {name: partial(in_thread, each) for name, each in children.items()}
        sides["transformers"] = Transformers(children["transformers"]).rate
        async with running_cluster(plan, lambda *_: None, lambda _: None, grace_s=10.0) as cluster:
            vocab_size = plan.model.vocab_size
            sides[TWO_TIERS] = partial(decode_two_tiers, cluster.client, vocab_size)
            for name, rate in sides.items():
                if name != "transformers":  # its trial warms it
                    await rate(2)
            for batch in batches:
                report(batch, [await one_round(sides, batch) for _ in range(rounds)])


async def one_round(sides: dict[str, Rate], batch: int) -> dict[str, float]:
    return {name: await rate(batch) for name, rate in sides.items()}


def report(batch: int, rounds: list[dict[str, float]]) -> None:
    ratios = {}
    for name in rounds[0]:
        rates = [each[name] for each in rounds]
        line = f"batch {batch:3}: {name:14} {statistics.median(rates):7.2f} tokens/s"
        if name != TWO_TIERS:
            ratios[name] = statistics.median(each[TWO_TIERS] / each[name] for each in rounds)
            goal = GOALS.get(batch, {}).get(name)
            line += f"   two tiers are {ratios[name]:.2f} times that"
            line += "" if goal is None else f" (goal {goal})"
        print(line)
    print(json.dumps({"batch": batch, "rounds": rounds, "median_ratios": ratios}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--llama", nargs=2, metavar=("PYTHON", "FILE"))
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    batches = [int(batch) for batch in options.batches.split(",")]
    llama = None if options.llama is None else tuple(options.llama)
    asyncio.run(measure(options.directory, llama, batches, options.rounds))


if __name__ == "__main__":
    main()
