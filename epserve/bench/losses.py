"""Rows about processes that are killed: an expert process, an attention process, the gateway.

Knows what is killed, when, and what is measured of the load after it.
"""

import asyncio
import signal
import statistics
import time
from types import MappingProxyType

from epserve.bench.layouts import TWO_GROUPS, TWO_HALVES, replicated
from epserve.bench.loaded import Loaded, LoadSize, failed, loaded
from epserve.bench.row import BenchSettings, Measured, Row
from epserve.chaos.load import Results
from epserve.chaos.timeline import spread
from moe_core.cluster import Role

WINDOW_S = 10.0
MOST_STALL_S, LEAST_THROUGHPUT = 0.3, 0.98
EXPERT_WAIT_S, MOST_AFTER_WAIT_S, MOST_UNTIL_SERVING_S = 2.0, 1.0, 2.0
STREAMS, STREAM_TOKENS = 64, 64
AFTER_S = 2.0
# Else the one process of a tier would have as many threads as each of two together.
ONE_THREAD = MappingProxyType({"OMP_NUM_THREADS": "1"})
MOST_ORPHAN_S, REPORT_S = 5.0, 1.0


async def _expert_with_replica(settings: BenchSettings) -> Measured:
    """What starts the replacement waits until all is measured: on one machine that would take from
    the survivors what they compute with."""
    num_failed, longest, ratios = 0, 0.0, []
    stalls: list[float] = []
    async with (
        loaded(settings.model, *replicated(settings), environment=ONE_THREAD) as pair,
        loaded(settings.model, "--expert-devices", "1", environment=ONE_THREAD) as one,
    ):
        for _ in range(settings.rounds):
            survivors_rate = await _survivors_rate(one)
            async with pair.under_load() as results:
                with pair.cluster.unattended():
                    member, at = await pair.cluster.end(Role.EXPERT, 1, signal.SIGKILL)
                    await asyncio.sleep(WINDOW_S)
            rate = results.timeline.tokens_per_s_between(at, at + WINDOW_S)
            num_failed += failed(results)
            stalls += results.timeline.gaps_across(at)
            longest = max(longest, results.timeline.longest_gap(at, at + WINDOW_S))
            ratios.append(rate / survivors_rate if survivors_rate else 0.0)
            await pair.cluster.whole_after(member)
    ratio, stall = statistics.median(ratios), spread(stalls).p99
    passed = num_failed == 0 and stall <= MOST_STALL_S and ratio >= LEAST_THROUGHPUT
    figures = {"failed_requests": num_failed, "stall_p99_s": stall, "longest_gap_after_s": longest}
    return Measured(passed, figures | {"throughput_to_survivors": ratio})


async def _survivors_rate(survivors: Loaded) -> float:
    """Tokens per second of a cluster that never had what the other has lost."""
    async with survivors.under_load() as results:
        began = time.monotonic()
        await asyncio.sleep(WINDOW_S)
    return results.timeline.tokens_per_s_between(began, began + WINDOW_S)


async def _expert_without_replica(settings: BenchSettings) -> Measured:
    waits, servings, codes, num_broken = [], [], set[str](), 0
    arguments = (*TWO_HALVES, "--expert-wait", str(EXPERT_WAIT_S))
    async with loaded(settings.model, *arguments) as loads:
        for _ in range(settings.rounds):
            async with loads.under_load() as results:
                member, at = await loads.cluster.end(Role.EXPERT, 1, signal.SIGKILL)
                await loads.cluster.whole_after(member)
                loaded_at = time.monotonic()
                await asyncio.sleep(2 * MOST_UNTIL_SERVING_S)
            waits += [end.at - max(at, end.sent_at) for end in results.errors]
            servings.append(results.timeline.next_after(loaded_at))
            codes |= set(results.error_codes)
            num_broken += results.num_broken
    longest = max(waits, default=0.0)
    serving = max((s for s in servings if s is not None), default=None)
    passed = (
        num_broken == 0
        and codes <= {"UNAVAILABLE"}
        and longest <= EXPERT_WAIT_S + MOST_AFTER_WAIT_S
        and serving is not None
        and None not in servings
        and serving <= MOST_UNTIL_SERVING_S
    )
    figures = {
        "broken_requests": num_broken,
        "errors": len(waits),
        "longest_until_error_s": longest,
    }
    return Measured(passed, figures | {"expert_wait_s": EXPERT_WAIT_S, "until_serving_s": serving})


async def _attention(settings: BenchSettings) -> Measured:
    num_failed, stalls = 0, []
    arguments = (*TWO_GROUPS, "--max-num-seqs", str(2 * STREAMS))
    size = LoadSize(STREAMS, STREAM_TOKENS)
    async with loaded(settings.model, *arguments, size=size) as loads:
        for _ in range(settings.rounds):
            async with loads.under_load() as results:
                member, at = await loads.cluster.end(Role.ATTN, 1, signal.SIGKILL)
                await asyncio.sleep(AFTER_S)
            num_failed += failed(results)
            stalls.append(results.timeline.longest_gap(at, results.timeline.ended))
            await loads.cluster.whole_after(member)
    figures = {"streams": STREAMS, "failed_requests": num_failed, "longest_stall_s": max(stalls)}
    return Measured(num_failed == 0, figures)


async def _gateway_resumed(settings: BenchSettings) -> Measured:
    num_failed, stalls, freed = 0, [], []
    async with loaded(settings.model, resuming=True) as loads:
        for _ in range(settings.rounds):
            async with loads.under_load() as results:
                member, at = await loads.cluster.end(Role.GATEWAY, 0, signal.SIGKILL)
                await loads.cluster.whole_after(member)
                await asyncio.sleep(AFTER_S)
            num_failed += failed(results)
            stalls.append(results.timeline.longest_gap(at, results.timeline.ended))
            freed.append(await loads.cluster.idle())
    passed = num_failed == 0 and max(freed) <= MOST_ORPHAN_S + REPORT_S
    figures = {"failed_requests": num_failed, "longest_stall_s": max(stalls)}
    return Measured(passed, figures | {"until_idle_s": max(freed)})


async def _orphans(settings: BenchSettings) -> Measured:
    """Nobody resumes: the sequences of a gateway that was killed are freed."""
    freed = []
    async with loaded(settings.model) as loads:
        for _ in range(settings.rounds):
            freed.append(await _orphans_freed(loads))
    longest = max(freed)
    return Measured(longest <= MOST_ORPHAN_S + REPORT_S, {"until_freed_s": longest})


async def _orphans_freed(loads: Loaded) -> float:
    """Seconds from the gateway's end; as its successor is told, so not before there is one."""
    load = loads.load.until(asyncio.Event(), loads.expected, Results(time.monotonic()))
    running = asyncio.create_task(load)
    try:
        await asyncio.sleep(AFTER_S)
        member, at = await loads.cluster.end(Role.GATEWAY, 0, signal.SIGKILL)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    await loads.cluster.whole_after(member)
    await loads.cluster.idle()
    return time.monotonic() - at


ROWS = (
    Row(
        "expert-killed",
        "expert process killed mid-step, replica exists",
        f"0 failed, stall p99 ≤ {MOST_STALL_S:g} s, then ≥ {LEAST_THROUGHPUT:.0%} of the tokens/s "
        "of a cluster that began without it",
        _expert_with_replica,
    ),
    Row(
        "expert-lost",
        "expert process killed, no replica",
        f"UNAVAILABLE within expert_wait_s + {MOST_AFTER_WAIT_S:g} s, serving again within "
        f"{MOST_UNTIL_SERVING_S:g} s of the replacement's being READY",
        _expert_without_replica,
    ),
    Row(
        "attn-killed",
        f"attention process killed under {STREAMS} streams",
        "all streams complete, exactly",
        _attention,
    ),
    Row(
        "gateway-killed",
        "gateway killed under streams",
        f"its clients resume by request_id, exactly; then no sequence is left for over "
        f"{MOST_ORPHAN_S:g} s",
        _gateway_resumed,
    ),
    Row(
        "orphans",
        "gateway killed, nobody resumes",
        f"sequences freed within {MOST_ORPHAN_S:g} s (and a second for the report)",
        _orphans,
    ),
)
