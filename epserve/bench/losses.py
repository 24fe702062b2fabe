"""Rows about processes that are killed: an expert process, an attention process, the gateway.

Knows what is killed, when, and what is measured of the load after it.
"""

import asyncio
import signal
import statistics
import time

from epserve.bench.row import BenchSettings, Measured, NotAvailableError, Row
from epserve.bench.served import ServedCluster, served, under_load
from epserve.chaos.checker import Outcome
from epserve.chaos.load import Expected, Load, Results
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.cluster import Member, Role

WARM_S, WINDOW_S = 2.0, 10.0
MOST_STALL_S, LEAST_THROUGHPUT = 0.3, 0.98
EXPERT_WAIT_S, MOST_AFTER_WAIT_S, MOST_UNTIL_SERVING_S = 2.0, 1.0, 2.0
STREAMS, STREAM_TOKENS = 64, 64
MOST_ORPHAN_S = 5.0
TWO_HALVES = ("--expert-devices", "2", "--ep-size", "2")


def replicated(settings: BenchSettings) -> tuple[str, ...]:
    """Two expert processes, each of which holds every expert."""
    return (*TWO_HALVES, "--num-redundant-experts", str(num_experts(settings)))


def num_experts(settings: BenchSettings) -> int:
    return Checkpoint.open(settings.model).config.moe.num_experts


async def kill(cluster: ServedCluster, role: Role, rank: int) -> tuple[Member, float]:
    """Who was killed, and when."""
    member = await cluster.member(role, rank)
    with await cluster.process(role, rank) as process:
        process.send(signal.SIGKILL)
        return member, time.monotonic()


def failed(results: Results) -> int:
    """Requests that were not served exactly."""
    return results.outcomes.total() - results.outcomes[Outcome.EXACT]


async def _expert_with_replica(settings: BenchSettings) -> Measured:
    survivors = ("--expert-devices", "1")
    num_failed, stalls, ratios = 0, [], []
    async with (
        served(settings.model, *replicated(settings)) as pair,
        served(settings.model, *survivors) as one,
    ):
        load, one_load = await pair.load(), await one.load()
        expected, one_expected = await load.quiet_results(), await one_load.quiet_results()
        for _ in range(settings.rounds):
            async with under_load(one_load, one_expected) as results:
                began = await _warm()
                await asyncio.sleep(WINDOW_S)
            survivors_rate = results.timeline.tokens_per_s_between(began, began + WINDOW_S)
            async with under_load(load, expected) as results:
                await _warm()
                member, at = await kill(pair, Role.EXPERT, 1)
                await asyncio.sleep(WINDOW_S)
            rate = results.timeline.tokens_per_s_between(at, at + WINDOW_S)
            num_failed += failed(results)
            stalls.append(results.timeline.longest_gap(at, at + WINDOW_S))
            ratios.append(rate / survivors_rate if survivors_rate else 0.0)
            await pair.whole_after(member)
    ratio = statistics.median(ratios)
    passed = num_failed == 0 and max(stalls) <= MOST_STALL_S and ratio >= LEAST_THROUGHPUT
    figures = {"failed_requests": num_failed, "longest_stall_s": max(stalls)}
    return Measured(passed, figures | {"throughput_to_survivors": ratio})


async def _warm() -> float:
    await asyncio.sleep(WARM_S)
    return time.monotonic()


async def _expert_without_replica(settings: BenchSettings) -> Measured:
    waits, servings, codes, num_broken = [], [], set[str](), 0
    arguments = (*TWO_HALVES, "--expert-wait", str(EXPERT_WAIT_S))
    async with served(settings.model, *arguments) as cluster:
        load = await cluster.load()
        expected = await load.quiet_results()
        for _ in range(settings.rounds):
            async with under_load(load, expected) as results:
                await _warm()
                member, at = await kill(cluster, Role.EXPERT, 1)
                await cluster.whole_after(member)
                loaded = time.monotonic()
                await asyncio.sleep(2 * MOST_UNTIL_SERVING_S)
            waits += [end.at - max(at, end.sent_at) for end in results.errors]
            servings.append(results.timeline.next_after(loaded))
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
    arguments = ("--attn-devices", "2", "--dp-size", "2", "--max-num-seqs", str(2 * STREAMS))
    async with served(settings.model, *arguments) as cluster:
        load = await cluster.load(STREAMS, STREAM_TOKENS)
        expected = await load.quiet_results()
        for _ in range(settings.rounds):
            async with under_load(load, expected) as results:
                await _warm()
                member, at = await kill(cluster, Role.ATTN, 1)
                await asyncio.sleep(WARM_S)
            num_failed += failed(results)
            stalls.append(results.timeline.longest_gap(at, results.timeline.ended))
            await cluster.whole_after(member)
    figures = {"streams": STREAMS, "failed_requests": num_failed, "longest_stall_s": max(stalls)}
    return Measured(num_failed == 0, figures)


async def _gateway_resumed(settings: BenchSettings) -> Measured:
    raise NotAvailableError("the client of this version cannot resume a stream")


async def _orphans(settings: BenchSettings) -> Measured:
    """Nobody resumes: the sequences of a gateway that was killed are freed."""
    freed = []
    async with served(settings.model) as cluster:
        load = await cluster.load()
        expected = await load.quiet_results()
        for _ in range(settings.rounds):
            freed.append(await _orphans_freed(cluster, load, expected))
    longest = max(freed)
    return Measured(longest <= MOST_ORPHAN_S + 1.0, {"until_freed_s": longest})


async def _orphans_freed(cluster: ServedCluster, load: Load, expected: Expected) -> float:
    """Seconds from the gateway's end; as its successor is told, so not before there is one."""
    running = asyncio.create_task(load.until(asyncio.Event(), expected, Results(time.monotonic())))
    try:
        await _warm()
        member, at = await kill(cluster, Role.GATEWAY, 0)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    await cluster.whole_after(member)
    await cluster.idle()
    return time.monotonic() - at


ROWS = (
    Row(
        "expert-killed",
        "expert process killed mid-step, replica exists",
        f"0 failed, stall ≤ {MOST_STALL_S:g} s, then ≥ {LEAST_THROUGHPUT:.0%} of survivors only",
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
        "its clients resume by request_id, exactly",
        _gateway_resumed,
    ),
    Row(
        "orphans",
        "gateway killed, nobody resumes",
        f"sequences freed within {MOST_ORPHAN_S:g} s (and a second for the report)",
        _orphans,
    ),
)
