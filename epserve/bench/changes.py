"""Rows about changes that an operator asks for while the cluster serves.

Knows the commands `scale`, `rebalance`, and SIGTERM, and what is measured of the load meanwhile.
"""

import asyncio
import random
import signal
import statistics
from collections.abc import Sequence
from itertools import product

from epserve.bench.layouts import TWO_GROUPS, TWO_HALVES, num_experts, replicated
from epserve.bench.loaded import failed, loaded
from epserve.bench.row import BenchSettings, Measured, Row
from epserve.bench.served import ServedCluster, command, served
from epserve.chaos.load import all_of
from epserve.chaos.timeline import spread
from epserve.client import Sampling
from moe_core import eplb
from moe_core.cluster import ClusterState, ExpertLoad, Role
from moe_core.errors import UnavailableError
from moe_core.placement import ExpertPlacement

BEFORE_S = 10.0
MOST_SLOWER = 3.0
SKEWED, BALANCED = 2.0, 1.15
SKEW_PROMPTS, SKEW_TOKENS, SKEW_AT_ONCE = 64, 32, 16
LOAD_REPORT_S = 6.0  # processes report their experts' load every five seconds


async def _scale_experts(settings: BenchSettings) -> Measured:
    return await _scale(settings, TWO_HALVES, "--experts", (4, 3, 2))


async def _scale_attention(settings: BenchSettings) -> Measured:
    return await _scale(settings, (), "--attn", (3, 1))


async def _scale(
    settings: BenchSettings, arguments: tuple[str, ...], option: str, sizes: Sequence[int]
) -> Measured:
    ratios, num_failed = [], 0
    async with loaded(settings.model, *arguments) as loads:
        cluster = loads.cluster
        for _ in range(settings.rounds):
            async with loads.under_load() as before:
                await asyncio.sleep(BEFORE_S)
            async with loads.under_load() as during:
                for size in sizes:
                    await command("scale", "--target", cluster.target, option, str(size))
                    await cluster.whole_after()
            usual, slow = spread(before.timeline.gaps).p99, spread(during.timeline.gaps).p99
            ratios.append(slow / usual)
            num_failed += failed(during)
    ratio = statistics.median(ratios)
    figures = {"p99_step_to_p99_before": ratio, "failed_requests": num_failed}
    return Measured(ratio <= MOST_SLOWER and num_failed == 0, figures)


async def _rebalance(settings: BenchSettings) -> Measured:
    """A quarter of the slots is redundant: four expert processes hold 4/3 of the experts."""
    before, after = [], []
    for _ in range(settings.rounds):  # each with a cluster that is not balanced yet
        redundant = ("--num-redundant-experts", str(round(num_experts(settings) / 3)))
        arguments = ("--expert-devices", "4", "--ep-size", "4", "--expert-parallel-degree", "2")
        async with served(settings.model, *arguments, *redundant) as cluster:
            before.append(await _imbalance_under_skew(cluster))
            await command("rebalance", "--target", cluster.target)
            after.append(await _imbalance_under_skew(cluster))
    skew, left = statistics.median(before), statistics.median(after)
    figures = {"max_to_mean_before": skew, "max_to_mean_after": left}
    return Measured(skew > SKEWED and left < BALANCED, figures)


async def _imbalance_under_skew(cluster: ServedCluster) -> float:
    then = await _loaded(cluster)
    await _skewed_load(cluster)
    await asyncio.sleep(LOAD_REPORT_S)
    now = await _loaded(cluster)
    assert now.expert_load is not None
    return imbalance(then.expert_load, now.expert_load, now.placement)


async def _loaded(cluster: ServedCluster) -> ClusterState:
    state = await cluster.client.cluster(expert_load=True)
    if state.expert_load is None:
        raise UnavailableError("the cluster does not tell the load of its experts")
    return state


async def _skewed_load(cluster: ServedCluster) -> None:
    """Prompts whose tokens follow Zipf's law, and so whose experts are few."""
    (model,) = await cluster.client.list_models()
    drawn = random.Random(5)
    weights = [1 / rank for rank in range(1, model.vocab_size + 1)]
    prompts = iter(
        [
            drawn.choices(range(model.vocab_size), weights, k=SKEW_TOKENS)
            for _ in range(SKEW_PROMPTS)
        ]
    )
    sampling = Sampling(max_tokens=SKEW_TOKENS, temperature=0.0, ignore_eos=True)

    async def worker() -> None:
        for prompt in prompts:
            async for _ in cluster.client.generate(prompt, sampling):
                pass

    await all_of(*(worker() for _ in range(SKEW_AT_ONCE)))


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


async def _rolling_restart(settings: BenchSettings) -> Measured:
    num_failed, slowest = 0, 0.0
    async with loaded(settings.model, *replicated(settings), *TWO_GROUPS) as loads:
        for _ in range(settings.rounds):
            async with loads.under_load() as results:
                for role, rank in product((Role.EXPERT, Role.ATTN), range(2)):
                    old, _ = await loads.cluster.end(role, rank, signal.SIGTERM)
                    slowest = max(slowest, await loads.cluster.whole_after(old))
            num_failed += failed(results)
    figures = {"failed_requests": num_failed, "slowest_restart_s": slowest}
    return Measured(num_failed == 0, figures)


ROWS = (
    Row(
        "scale-experts",
        "experts 2→4→3→2 under load",
        f"0 failed, p99 between tokens ≤ {MOST_SLOWER:g} × before",
        _scale_experts,
    ),
    Row(
        "scale-attn",
        "attention 1→3→1 under load",
        f"0 failed, p99 between tokens ≤ {MOST_SLOWER:g} × before",
        _scale_attention,
    ),
    Row(
        "skew",
        "skewed routing (Zipf), a quarter of the slots redundant",
        f"max/mean load per process from above {SKEWED:g} to below {BALANCED:g}",
        _rebalance,
    ),
    Row(
        "rolling-restart",
        "every worker restarted in turn under load",
        "0 failed",
        _rolling_restart,
    ),
)
