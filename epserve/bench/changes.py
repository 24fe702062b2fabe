"""Rows about changes that an operator asks for while the cluster serves.

Knows the command `scale`, and SIGTERM, and what is measured of the load meanwhile.
"""

import asyncio
import signal
import statistics
from collections.abc import Sequence
from itertools import product

from epserve.bench.layouts import TWO_GROUPS, TWO_HALVES, replicated
from epserve.bench.loaded import failed, loaded
from epserve.bench.row import BenchSettings, Measured, Row
from epserve.bench.served import command
from epserve.chaos.timeline import spread
from moe_core.cluster import Role

BEFORE_S = 10.0
MOST_SLOWER = 3.0


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
        "rolling-restart",
        "every worker restarted in turn under load",
        "0 failed",
        _rolling_restart,
    ),
)
