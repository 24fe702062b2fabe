"""Rows about processes that stand still or are slow.

Knows how long they are stopped, and what is measured of the load meanwhile.
"""

import asyncio
import signal
import statistics
import time

from epserve.bench.layouts import TWO_GROUPS, replicated
from epserve.bench.loaded import failed, loaded
from epserve.bench.row import BenchSettings, Measured, Row
from epserve.bench.served import ServedCluster
from epserve.chaos.nemesis import slow_down
from epserve.chaos.timeline import spread
from moe_core.cluster import Role

FROZEN_S, MOST_UNTIL_NOTICED_S = 6.0, 3.0
SLOW_S, STOP_S, HEDGE_AFTER_S = 10.0, 0.05, 0.03
MOST_SLOWER = 3.0


async def _expert_frozen(settings: BenchSettings) -> Measured:
    return await _frozen(settings, Role.EXPERT, replicated(settings))


async def _attention_frozen(settings: BenchSettings) -> Measured:
    return await _frozen(settings, Role.ATTN, TWO_GROUPS)


async def _frozen(settings: BenchSettings, role: Role, arguments: tuple[str, ...]) -> Measured:
    noticed, num_failed = [], 0
    async with loaded(settings.model, *arguments) as loads:
        for _ in range(settings.rounds):
            async with loads.under_load() as results:
                noticed.append(await _freeze(loads.cluster, role))
            num_failed += failed(results)
            await loads.cluster.whole_after()
    late = None in noticed
    longest = max((each for each in noticed if each is not None), default=None)
    passed = not late and longest is not None and longest <= MOST_UNTIL_NOTICED_S
    figures = {"until_noticed_s": None if late else longest, "failed_requests": num_failed}
    return Measured(passed and num_failed == 0, figures)


async def _freeze(cluster: ServedCluster, role: Role) -> float | None:
    """Seconds until the cluster has noticed; None: not while it lasted."""
    member = await cluster.member(role, 1)
    with await cluster.process(role, 1) as process:
        began = time.monotonic()
        process.send(signal.SIGSTOP)
        try:
            noticed = await cluster.seconds_until_gone(member, FROZEN_S)
            await asyncio.sleep(max(0.0, began + FROZEN_S - time.monotonic()))
        finally:
            process.send(signal.SIGCONT)
    return noticed


async def _expert_slow(settings: BenchSettings) -> Measured:
    ratios, num_failed = [], 0
    arguments = (*replicated(settings), "--hedge-after", str(HEDGE_AFTER_S))
    async with loaded(settings.model, *arguments) as loads:
        for _ in range(settings.rounds):
            async with loads.under_load() as before:
                await asyncio.sleep(SLOW_S)
            async with loads.under_load() as during:
                with await loads.cluster.process(Role.EXPERT, 1) as process:
                    await slow_down(process, SLOW_S, STOP_S, STOP_S)
            usual, slow = spread(before.timeline.gaps).p50, spread(during.timeline.gaps).p99
            ratios.append(slow / usual)
            num_failed += failed(during)
    ratio = statistics.median(ratios)
    figures = {"p99_step_to_median_without": ratio, "failed_requests": num_failed}
    return Measured(ratio <= MOST_SLOWER and num_failed == 0, figures)


ROWS = (
    Row(
        "expert-frozen",
        "expert process frozen, replica exists",
        f"noticed within {MOST_UNTIL_NOTICED_S:g} s, 0 failed",
        _expert_frozen,
    ),
    Row(
        "attn-frozen",
        "attention process frozen",
        f"noticed within {MOST_UNTIL_NOTICED_S:g} s, 0 failed",
        _attention_frozen,
    ),
    Row(
        "expert-slow",
        f"expert process stopped {1000 * STOP_S:g} ms again and again, replica and --hedge-after",
        f"p99 between tokens ≤ {MOST_SLOWER:g} × the median without it",
        _expert_slow,
    ),
)
