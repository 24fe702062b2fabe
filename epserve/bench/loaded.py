"""A cluster of a benchmark with the load that it is measured under, and the load's quiet results.

Knows how much is asked at a time, and when the cluster was hit. Knows no goal.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from epserve.bench.served import NOTHING, ServedCluster, served
from epserve.chaos.checker import Outcome
from epserve.chaos.load import Expected, Generates, Load, Results
from epserve.chaos.requests import draw_requests
from epserve.client import EpserveClient
from epserve.resuming import ResumingClient
from moe_core.cluster import Role

REQUESTS, CONCURRENCY, MAX_TOKENS, DEADLINE_S = 32, 16, 64, 60.0
RESUME_S = 30.0  # for a gateway to be started again
WARM_S = 2.0


@dataclass(frozen=True, slots=True)
class LoadSize:
    concurrency: int = CONCURRENCY
    max_tokens: int = MAX_TOKENS


USUAL = LoadSize()


@dataclass(frozen=True, slots=True)
class Loaded:
    cluster: ServedCluster
    load: Load
    expected: Expected

    @asynccontextmanager
    async def under_load(self) -> AsyncIterator[Results]:
        """The load for as long as this is entered, which is once it has warmed up. What has begun
        by the end still ends."""
        results, stop = Results(time.monotonic()), asyncio.Event()
        running = asyncio.create_task(self.load.until(stop, self.expected, results))
        try:
            await asyncio.sleep(WARM_S)
            yield results
            stop.set()
            await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


@asynccontextmanager
async def loaded(
    model: Path,
    *arguments: str,
    size: LoadSize = USUAL,
    resuming: bool = False,
    environment: Mapping[str, str] = NOTHING,
) -> AsyncIterator[Loaded]:
    """`served` with these arguments, and the results of the load without a fault. `resuming`: the
    load's clients resume at another gateway, or at the same once it is there again."""
    async with (
        served(model, *arguments, environment=environment) as cluster,
        AsyncExitStack() as clients,
    ):
        generates: Generates = cluster.client
        if resuming:
            generates = ResumingClient(await _gateways(cluster, clients), RESUME_S)
        (card,) = await cluster.client.list_models()
        requests = draw_requests(card, max(REQUESTS, size.concurrency), size.max_tokens, seed=11)
        load = Load(generates, requests, size.concurrency, DEADLINE_S)
        yield Loaded(cluster, load, await load.quiet_results())


async def _gateways(cluster: ServedCluster, clients: AsyncExitStack) -> Sequence[EpserveClient]:
    """One client of each, the cluster's own first: that one is going to be lost."""
    state = await cluster.client.cluster()
    addresses = {member.address for member in state.tier(Role.GATEWAY)} - {cluster.target}
    others = [await clients.enter_async_context(EpserveClient(each)) for each in addresses]
    return [cluster.client, *others]


def failed(results: Results) -> int:
    """Requests that were not served exactly."""
    return results.outcomes.total() - results.outcomes[Outcome.EXACT]
