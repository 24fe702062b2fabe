"""The row about routing that is skewed, and what `epserve rebalance` makes of it.

Knows a load whose experts are few, and how to tell how evenly EP groups are loaded. What prompts
crowd which experts is the model's secret: rankings of tokens are tried until one does.
"""

import asyncio
import random
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from epserve.bench.layouts import num_experts
from epserve.bench.row import BenchSettings, Measured, Row
from epserve.bench.served import ServedCluster, command, served
from epserve.chaos.load import all_of
from epserve.generate_messages import Sampling
from moe_core import eplb
from moe_core.cluster import ExpertLoad
from moe_core.errors import UnavailableError
from moe_core.placement import ExpertPlacement

SKEWED, BALANCED = 2.0, 1.15
ZIPF_EXPONENT = 3.0
MOST_RANKINGS = 8
# Long prompts and short answers: what is routed is what was drawn.
PROMPTS, PROMPT_TOKENS, MAX_TOKENS, AT_ONCE = 32, 128, 4, 8
LOAD_REPORT_S = 6.0  # processes report their experts' load every five seconds


async def _rebalance(settings: BenchSettings) -> Measured:
    before, after = [], []
    ranking = await _crowding_ranking(settings)
    for _ in range(settings.rounds):  # each with a cluster that is not balanced yet
        async with _four_groups(settings) as cluster:
            before.append(await _imbalance_under_skew(cluster, ranking))
            await command("rebalance", "--target", cluster.target)
            after.append(await _imbalance_under_skew(cluster, ranking))
    skew, left = statistics.median(before), statistics.median(after)
    figures = {"max_to_mean_before": skew, "max_to_mean_after": left}
    return Measured(skew > SKEWED and left < BALANCED, figures)


@asynccontextmanager
async def _four_groups(settings: BenchSettings) -> AsyncIterator[ServedCluster]:
    """A quarter of the slots is redundant: four expert processes hold 4/3 of the experts."""
    redundant = ("--num-redundant-experts", str(round(num_experts(settings) / 3)))
    arguments = ("--expert-devices", "4", "--ep-size", "4", "--expert-parallel-degree", "2")
    async with served(settings.model, *arguments, *redundant) as cluster:
        yield cluster


async def _crowding_ranking(settings: BenchSettings) -> int:
    """The first that skews enough, else the most skewed."""
    found: dict[int, float] = {}
    async with _four_groups(settings) as cluster:
        for ranking in range(MOST_RANKINGS):
            found[ranking] = await _imbalance_under_skew(cluster, ranking)
            if found[ranking] > SKEWED:
                break
    return max(found, key=lambda ranking: found[ranking])


async def _imbalance_under_skew(cluster: ServedCluster, ranking: int) -> float:
    then = (await cluster.client.cluster(expert_load=True)).expert_load
    await _skewed_load(cluster, ranking)
    await asyncio.sleep(LOAD_REPORT_S)
    now = await cluster.client.cluster(expert_load=True)
    if now.expert_load is None:
        raise UnavailableError("the cluster does not tell the load of its experts")
    return imbalance(then, now.expert_load, now.placement)


async def _skewed_load(cluster: ServedCluster, ranking: int) -> None:
    """Prompts whose tokens follow Zipf's law; `ranking` seeds which tokens are the frequent ones.
    Each prompt begins otherwise, so that none is found in the cache."""
    (model,) = await cluster.client.list_models()
    drawn = random.Random(ranking)
    tokens = drawn.sample(range(model.vocab_size), model.vocab_size)
    weights = [rank**-ZIPF_EXPONENT for rank in range(1, len(tokens) + 1)]
    fresh = random.Random()
    prompts = iter(
        [
            [fresh.randrange(model.vocab_size), *drawn.choices(tokens, weights, k=PROMPT_TOKENS)]
            for _ in range(PROMPTS)
        ]
    )
    sampling = Sampling(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)

    async def worker() -> None:
        for prompt in prompts:
            async for _ in cluster.client.generate(prompt, sampling):
                pass

    await all_of(*(worker() for _ in range(AT_ONCE)))


def imbalance(then: ExpertLoad | None, now: ExpertLoad, placement: ExpertPlacement) -> float:
    """Tokens of the most loaded EP group over the mean, in the mean of layers, of what came between
    two loads; an expert's tokens are shared out evenly over its copies."""
    load = now if then is None else now.since(then)
    ratios = [
        eplb.imbalance(tokens, placement.layer(layer_id).held(placement.ep_size))
        for layer_id, tokens in zip(load.layer_ids, load.tokens, strict=True)
        if any(tokens)
    ]
    return statistics.mean(ratios) if ratios else 1.0


ROWS = (
    Row(
        "skew",
        f"skewed routing (Zipf, exponent {ZIPF_EXPONENT:g}), a quarter of the slots redundant",
        f"max/mean load per process from above {SKEWED:g} to below {BALANCED:g}",
        _rebalance,
    ),
)
