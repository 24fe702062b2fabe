"""Minutes of random faults: every token is right or there is one error, and nothing grows.

Runs for --soak seconds; `make soak` for half an hour.
"""

import asyncio
import json
import time
from dataclasses import dataclass

import psutil
import pytest

from epserve.client import EpserveClient
from moe_core.cluster import ClusterState, Role
from support.processes import Running, serving, started, still_alive

# Every expert is on both expert processes, so that one of each tier may be missing at any time.
LAYOUT = (
    *("--attn-devices", "2", "--dp-size", "2", "--expert-devices", "2", "--ep-size", "2"),
    *("--num-redundant-experts", "16", "--dtype", "float64", "--kv-cache-tokens", "8192"),
)
LOAD = ("--concurrency", "8", "--max-tokens", "32", "--deadline", "60")
TRIAL_S = 400  # beside the faults: quiet passes, the settling at the end
IDLE_TIMEOUT_S = 30
# Of a process that lives from before to after. Allocators keep arenas; each replaced peer leaves
# its connection's worth of them behind.
MOST_BYTES = 48 * 2**20
MOST_DESCRIPTORS = 8
MOST_THREADS = 8
MOST_TASKS = 8
TOLD_S = 3.0  # tasks are told of with the leases, every second


@dataclass(frozen=True)
class Size:
    rss: int
    descriptors: int
    threads: int
    tasks: int


def sizes(state: ClusterState, serve: Running) -> dict[tuple[str, int], Size]:
    """Of every process, by its name and its start (a replaced one is another). What `serve` has of
    tasks nobody tells."""
    found = {}
    named = [(f"{m.role} {m.rank}", m.pid, m.loop_tasks) for m in state.members]
    assert all(tasks for _, _, tasks in named), named
    for name, pid, tasks in [*named, ("serve", serve.pid, 0)]:
        process = psutil.Process(pid)
        with process.oneshot():
            rss, descriptors = process.memory_info().rss, process.num_fds()
            found[name, pid] = Size(rss, descriptors, process.num_threads(), tasks)
    return found


async def idle_state(client: EpserveClient) -> ClusterState:
    """Once everybody is READY and no sequence is left."""
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        state = await client.cluster()
        loads = [member.attention_load for member in state.tier(Role.ATTN)]
        busy = any(
            load is None
            or load.num_running
            or load.num_waiting
            or load.free_kv_blocks != load.total_kv_blocks
            for load in loads
        )
        missing = [words for role in Role for words in state.missing(role)]
        if not busy and not missing:
            await asyncio.sleep(TOLD_S)
            return await client.cluster()
        assert time.monotonic() < deadline, (missing, loads)
        await asyncio.sleep(0.5)


def chaos(target: str, *options: str, duration_s: float) -> dict[str, object]:
    """Its report. It must have held."""
    arguments = ("chaos", "--target", target, "--json", "--duration", f"{duration_s:g}")
    with started(*arguments, *LOAD, *options) as running:
        status = running.wait(duration_s + TRIAL_S)
    assert status == 0, running
    report: dict[str, object] = json.loads(running.out[-1])
    assert report["held"] is True
    return report


@pytest.fixture
def soak_s(request: pytest.FixtureRequest) -> float:
    seconds = float(request.config.getoption("--soak"))
    if not seconds:
        pytest.skip("takes as long as --soak says, in seconds")
    return seconds


@pytest.mark.timeout(0)
async def test_random_faults_break_no_request_and_leave_nothing_behind(soak_s: float):
    with serving(*LAYOUT) as (serve, target):
        async with EpserveClient(target) as client:
            # What only the first losses of a process cost it, such as a peer's second connection.
            await asyncio.to_thread(chaos, target, "--seed", "1", duration_s=soak_s / 6)
            before = sizes(await idle_state(client), serve)
            report = await asyncio.to_thread(chaos, target, "--seed", "2", duration_s=soak_s)
            after = sizes(await idle_state(client), serve)
        family = serve.family()
        assert report["not_ready"] == []
        assert len(report["faults"]) > soak_s / 30, report["faults"]
        assert report["requests"]["exact"] > report["requests"]["error"]
        require_no_growth(before, after)
        assert len(family) == len(after), [process.cmdline() for process in family]
    assert still_alive(family) == []


def require_no_growth(
    before: dict[tuple[str, int], Size], after: dict[tuple[str, int], Size]
) -> None:
    survivors = before.keys() & after.keys()
    assert any(name.startswith("gateway") for name, _ in survivors)
    for name in survivors:
        grown = f"{name}: {before[name]} before, {after[name]} after"
        assert after[name].rss - before[name].rss < MOST_BYTES, grown
        assert after[name].descriptors - before[name].descriptors <= MOST_DESCRIPTORS, grown
        assert after[name].threads - before[name].threads <= MOST_THREADS, grown
        assert after[name].tasks - before[name].tasks <= MOST_TASKS, grown
