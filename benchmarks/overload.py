"""Three times the load that a cluster can serve: goodput, refusals and shares, in one run.

    python benchmarks/overload.py [--model DIR]

Starts `epserve serve` with two API keys of equal weight. First the best throughput of closed loops
at several concurrencies; then requests arrive at random, at three times that rate, three quarters
of them with one key, while the queue refuses what it cannot hold. Rounds of both take turns,
because the machine drifts. Prints a table, and one JSON line.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from epserve.client import EpserveClient
from epserve.cluster_settings import ClusterSettings
from epserve.gateway_connection import Target
from epserve.generate_messages import Sampling
from epserve.launch_plan import make_plan
from epserve.local_cluster import running_cluster
from gateway.api_keys import hash_of, new_key
from moe_core.errors import TooManyRequestsError

TINY = Path(__file__).parents[1] / "epserve" / "tiny_model"
PROMPT_TOKENS, NUM_TOKENS = 32, 64
MAX_NUM_SEQS, MAX_QUEUED = 16, 32
CONCURRENCIES = (8, 16, 24)
FLOODING_PART = 0.75
SAMPLING = Sampling(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)


@dataclass
class Seen:
    """What clients saw between `since` and `until`: tokens by key, and seconds to each refusal."""

    since: float
    until: float
    tokens: Counter[int] = field(default_factory=Counter)
    refusals_s: list[float] = field(default_factory=list)

    def arrived(self, key: int, num_tokens: int) -> None:
        if self.since <= time.perf_counter() < self.until:
            self.tokens[key] += num_tokens

    @property
    def tokens_per_s(self) -> float:
        return self.tokens.total() / (self.until - self.since)


class Load:
    """Requests with one of two keys, one connection each."""

    def __init__(self, clients: list[EpserveClient], vocab_size: int) -> None:
        self._clients = clients
        self._random = random.Random(7)
        self._vocab_size = vocab_size

    async def request(self, key: int, seen: Seen) -> None:
        prompt = [self._random.randrange(2, self._vocab_size) for _ in range(PROMPT_TOKENS)]
        sent = time.perf_counter()
        try:
            async for output in self._clients[key].generate(prompt, SAMPLING):
                seen.arrived(key, len(output.token_ids))
        except TooManyRequestsError:
            if seen.since <= sent < seen.until:
                seen.refusals_s.append(time.perf_counter() - sent)

    async def closed(self, concurrency: int, warm_s: float, window_s: float) -> Seen:
        """Each of `concurrency` clients sends its next request when the last has ended."""
        seen = _window(warm_s, window_s)

        async def again_and_again(index: int) -> None:
            while time.perf_counter() < seen.until:
                await self.request(index % 2, seen)

        async with asyncio.TaskGroup() as group:
            for index in range(concurrency):
                group.create_task(again_and_again(index))
        return seen

    async def open(self, requests_per_s: float, warm_s: float, window_s: float) -> Seen:
        """Requests come at random, whatever becomes of them."""
        seen = _window(warm_s, window_s)
        due = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            while (due := due + self._random.expovariate(requests_per_s)) < seen.until:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                key = int(self._random.random() >= FLOODING_PART)
                group.create_task(self.request(key, seen))
        return seen


def _window(warm_s: float, window_s: float) -> Seen:
    since = time.perf_counter() + warm_s
    return Seen(since, since + window_s)


@asynccontextmanager
async def loaded_cluster(model: Path) -> AsyncIterator[Load]:
    keys = [new_key(), new_key()]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "keys.json"
        entries = [{"name": f"key{i}", "hash": hash_of(key)} for i, key in enumerate(keys)]
        path.write_text(json.dumps(entries))
        settings = ClusterSettings(
            model=model,
            device="cpu",
            kv_cache_tokens=16_384,
            max_num_seqs=MAX_NUM_SEQS,
            max_queued_requests=MAX_QUEUED,
            api_keys=path,
        )
        plan = make_plan(settings)
        async with running_cluster(plan, lambda *_: None, lambda _: None, grace_s=10.0):
            first = EpserveClient(Target(plan.target, api_key=keys[0]))
            second = EpserveClient(Target(plan.target, api_key=keys[1]))
            async with first, second:
                yield Load([first, second], plan.model.vocab_size)


async def measure(model: Path, rounds: int, window_s: float) -> None:
    async with loaded_cluster(model) as load:
        peaks = {c: await load.closed(c, 3.0, window_s / 2) for c in CONCURRENCIES}
        best = max(peaks, key=lambda c: peaks[c].tokens_per_s)
        pairs = []
        for _ in range(rounds):
            peak = await load.closed(best, 2.0, window_s)
            rate = 3 * peak.tokens_per_s / NUM_TOKENS
            pairs.append((peak, await load.open(rate, 4.0, window_s)))
    report(best, pairs)


def report(best: int, pairs: list[tuple[Seen, Seen]]) -> None:
    refusals_ms = sorted(1000 * each for _, flood in pairs for each in flood.refusals_s)
    shares = [sum(flood.tokens[key] for _, flood in pairs) for key in (0, 1)]
    result = {
        "best_concurrency": best,
        "peak_tokens_per_s": [round(peak.tokens_per_s, 1) for peak, _ in pairs],
        "overload_tokens_per_s": [round(flood.tokens_per_s, 1) for _, flood in pairs],
        "goodput_ratio": statistics.median(f.tokens_per_s / p.tokens_per_s for p, f in pairs),
        "refused": len(refusals_ms),
        "refusal_p50_ms": _quantile(refusals_ms, 0.5),
        "refusal_p99_ms": _quantile(refusals_ms, 0.99),
        "tokens_by_key": shares,
        "jain": sum(shares) ** 2 / (2 * sum(share**2 for share in shares)),
    }
    for name, value in result.items():
        print(f"{name:24} {value:.3f}" if isinstance(value, float) else f"{name:24} {value}")
    print(json.dumps(result), flush=True)


def _quantile(ordered: list[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window", type=float, default=15.0, help="seconds of each measurement")
    options = parser.parse_args()
    asyncio.run(measure(options.model.absolute(), options.rounds, options.window))


if __name__ == "__main__":
    main()
