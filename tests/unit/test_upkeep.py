"""Which processes are started again, when, and which are not; no process is started here."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest

from epserve.restarts import LONGEST_END_S, Deaths, RestartLimits
from epserve.supervisor import ChildSpec, ProcessEndedError
from epserve.upkeep import Upkeep
from moe_core.cluster import ClusterState, Member, MemberState, Role, TierSizes
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import UnavailableError
from moe_core.placement import ExpertPlacement

PARALLEL = ParallelConfig(expert_devices=2, ep_size=2)
SIZES = TierSizes(attn_devices=1, expert_devices=2)
AT_ONCE = RestartLimits(first_pause_s=0.0)
NAMES = ("gateway", "attn 0", "expert 0", "expert 1")


@dataclass
class Fake:
    """Processes whose ids are given in the order of their starts."""

    pids: dict[str, int] = field(default_factory=lambda: dict(zip(NAMES, range(4), strict=True)))
    started: list[str] = field(default_factory=list)
    told_to_end: list[str] = field(default_factory=list)
    ends: "asyncio.Queue[ProcessEndedError]" = field(default_factory=asyncio.Queue)

    async def start(self, spec: ChildSpec) -> None:
        self.started.append(spec.name)
        self.pids[spec.name] = 100 + len(self.started)

    def end(self, name: str) -> None:
        self.told_to_end.append(name)

    async def next_end(self) -> ProcessEndedError:
        return await self.ends.get()

    def die(self, name: str, status: int = -9) -> ProcessEndedError:
        return ProcessEndedError(name, self.pids[name], status, ["last words"])

    def forget(self, end: ProcessEndedError) -> None:
        del self.pids[end.name]


class Watched:
    """A client; each of its streams tells a state and ends, the last one never."""

    def __init__(self, *states: ClusterState) -> None:
        self._states = list(states)

    async def watch_cluster(self) -> AsyncIterator[ClusterState]:
        if self._states:
            yield self._states.pop(0)
            raise UnavailableError("the gateway is gone")
        await asyncio.Event().wait()


@pytest.fixture
def processes() -> Fake:
    return Fake()


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def upkeep(processes: Fake, notes: list[str]) -> Upkeep:
    def child_of(role: Role, rank: int) -> ChildSpec:
        name = "gateway" if role is Role.GATEWAY else f"{role} {rank}"
        return ChildSpec(name, ("true",))

    return Upkeep(processes, child_of, SIZES, notes.append, AT_ONCE, at_once=2)


def state_of(
    processes: Fake,
    *,
    parallel: ParallelConfig = PARALLEL,
    target: TierSizes | None = None,
    gateway: tuple[MemberState, int] = (MemberState.READY, 1),
    leaving: Sequence[str] = (),
    loading: Sequence[str] = (),
) -> ClusterState:
    return ClusterState(
        1,
        parallel,
        tuple(_members(processes, gateway, leaving, loading)),
        ExpertPlacement(0, 2, 2, ()),
        target=target,
    )


def _members(
    processes: Fake,
    gateway: tuple[MemberState, int],
    leaving: Sequence[str],
    loading: Sequence[str],
) -> Iterator[Member]:
    for name, pid in processes.pids.items():
        role, _, rank = name.partition(" ")
        member = Member(Role(role), int(rank or 0), pid, "h:1", "cpu", MemberState.READY, 1, "h")
        if role == "gateway":
            member = replace(member, state=gateway[0], instance_epoch=gateway[1])
        if name in loading:
            member = replace(member, state=MemberState.LOADING)
        yield replace(member, leaving=name in leaving)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("status", [0, 1, -9])
async def test_what_dies_is_started_again(
    name: str, status: int, upkeep: Upkeep, processes: Fake, notes: list[str]
) -> None:
    upkeep.ended(processes.die(name, status))
    await settle()
    assert processes.started == [name]
    assert notes[0].startswith(f"starting {name} again in 0 s: {name} (pid ")
    assert "last words" in notes[0]


async def test_settings_that_were_refused_are_not_tried_again(
    upkeep: Upkeep, processes: Fake
) -> None:
    with pytest.raises(ProcessEndedError, match="exit status 2"):
        upkeep.ended(processes.die("expert 1", 2))


async def test_too_many_deaths_are_the_end_and_say_so(upkeep: Upkeep, processes: Fake) -> None:
    for _ in range(AT_ONCE.deaths - 1):
        upkeep.ended(processes.die("attn 0"))
        await settle()
    with pytest.raises(ProcessEndedError, match="attn 0") as caught:
        upkeep.ended(processes.die("attn 0"))
    assert caught.value.__notes__ == [
        "it has ended 5 times within 60 s or without being ready, and is not started again"
    ]


async def test_ranks_that_the_target_adds_are_started_once(upkeep: Upkeep, processes: Fake) -> None:
    grown = state_of(processes, target=TierSizes(1, 4))
    upkeep.take(grown)
    upkeep.take(grown)
    await settle()
    upkeep.take(grown)
    await settle()
    assert sorted(processes.started) == ["expert 2", "expert 3"]


async def test_a_rank_that_only_the_target_has_is_given_up_and_the_cluster_is_not(
    upkeep: Upkeep, processes: Fake, notes: list[str]
) -> None:
    grown = state_of(processes, target=TierSizes(1, 3))
    upkeep.take(grown)
    await settle()
    upkeep.ended(processes.die("expert 2", 2))
    upkeep.take(grown)
    await settle()
    assert processes.started == ["expert 2"]
    assert notes[-1].startswith("the tier does not grow by expert 2, nor by more: expert 2 (pid ")
    upkeep.take(state_of(processes))  # rolled back
    upkeep.take(grown)  # asked for again
    await settle()
    assert processes.started == ["expert 2", "expert 2"]


async def test_a_tier_grows_by_few_processes_at_a_time(upkeep: Upkeep, processes: Fake) -> None:
    ranks = [f"attn {rank}" for rank in range(1, 6)]
    for ready in range(0, 6):
        loading = ranks[ready:]
        upkeep.take(state_of(processes, target=TierSizes(6, 2), loading=loading))
        await settle()
        assert processes.started == ranks[: ready + 2]


async def test_a_tp_group_starts_whole_however_few_start_at_a_time(
    upkeep: Upkeep, processes: Fake
) -> None:
    groups_of_4 = ParallelConfig(attn_devices=4, expert_devices=2, ep_size=2)
    processes.pids |= {f"attn {rank}": 10 + rank for rank in range(1, 4)}
    upkeep.take(state_of(processes, parallel=groups_of_4, target=TierSizes(12, 2)))
    await settle()
    assert processes.started == [f"attn {rank}" for rank in range(4, 8)]


async def test_who_is_no_longer_wanted_before_it_was_ready_is_ended_at_once(
    upkeep: Upkeep, processes: Fake, notes: list[str]
) -> None:
    target = TierSizes(9, 2)
    upkeep.take(state_of(processes, target=target))
    await settle()
    joined = ["attn 1"]  # the gateway does not know attn 2 yet
    pid = processes.pids.pop("attn 2")
    upkeep.take(state_of(processes, target=target, loading=joined))
    processes.pids["attn 2"] = pid
    taken_back = state_of(processes, loading=["attn 1", "attn 2"], leaving=joined)
    upkeep.take(taken_back)
    upkeep.take(taken_back)
    assert processes.told_to_end == ["attn 1", "attn 2"]
    assert notes[-1] == "ending attn 1, attn 2: the cluster is no longer to have so many"
    for name in processes.told_to_end:
        upkeep.ended(processes.die(name, -15))
    await settle()
    assert processes.started == ["attn 1", "attn 2"]
    assert notes[-1].startswith("ending ")
    upkeep.take(state_of(processes, target=TierSizes(2, 2)))  # asked for again
    await settle()
    assert processes.started == ["attn 1", "attn 2", "attn 1"]


async def test_who_has_been_ready_is_left_to_the_gateway_to_send_away(
    upkeep: Upkeep, processes: Fake
) -> None:
    upkeep.take(state_of(processes))
    upkeep.take(state_of(processes, target=TierSizes(1, 1), leaving=["expert 1"]))
    assert processes.told_to_end == []


async def test_a_growth_of_which_one_rank_cannot_come_starts_no_more(
    upkeep: Upkeep, processes: Fake
) -> None:
    upkeep.take(state_of(processes, target=TierSizes(9, 2)))
    await settle()
    upkeep.ended(processes.die("attn 1", 2))
    upkeep.take(state_of(processes, target=TierSizes(9, 2)))
    await settle()
    assert processes.started == ["attn 1", "attn 2"]


async def test_a_rank_beyond_the_target_is_not_started_again(
    upkeep: Upkeep, processes: Fake, notes: list[str]
) -> None:
    upkeep.take(state_of(processes, target=TierSizes(1, 1)))
    upkeep.ended(processes.die("expert 1", 0))
    upkeep.take(state_of(processes, parallel=ParallelConfig()))
    await settle()
    assert processes.started == []
    assert "the tier has become smaller" in notes[0]


async def test_who_was_asked_to_leave_is_not_started_again_until_it_is_asked_for(
    upkeep: Upkeep, processes: Fake
) -> None:
    upkeep.take(state_of(processes, leaving=["expert 1"]))
    upkeep.ended(processes.die("expert 1", 0))
    upkeep.take(state_of(processes))
    await settle()
    assert processes.started == []
    upkeep.take(state_of(processes, target=SIZES))
    await settle()
    assert processes.started == ["expert 1"]


async def test_who_is_asked_for_before_it_has_ended_is_started_again_when_it_has(
    upkeep: Upkeep, processes: Fake
) -> None:
    upkeep.take(state_of(processes, leaving=["expert 1"]))
    pid = processes.pids.pop("expert 1")
    has_left = state_of(processes, target=SIZES)
    processes.pids["expert 1"] = pid
    upkeep.take(has_left)
    upkeep.ended(processes.die("expert 1", 0))
    await settle()
    assert processes.started == ["expert 1"]


async def test_who_is_no_longer_asked_to_leave_is_started_again(
    upkeep: Upkeep, processes: Fake
) -> None:
    upkeep.take(state_of(processes, leaving=["expert 1"]))
    upkeep.take(state_of(processes))
    upkeep.ended(processes.die("expert 1", 0))
    await settle()
    assert processes.started == ["expert 1"]


async def test_a_new_gateway_is_believed_once_it_has_been_ready(
    upkeep: Upkeep, processes: Fake
) -> None:
    wider = ParallelConfig(expert_devices=4, ep_size=4)
    upkeep.take(state_of(processes))
    upkeep.take(state_of(processes, parallel=wider, gateway=(MemberState.CONNECTING, 2)))
    await settle()
    assert processes.started == []
    upkeep.take(state_of(processes, parallel=wider, gateway=(MemberState.READY, 2)))
    await settle()
    assert sorted(processes.started) == ["expert 2", "expert 3"]


async def test_it_runs_on_while_the_gateway_goes_and_comes(
    upkeep: Upkeep, processes: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("epserve.upkeep.RETRY_S", 0.0)
    client = Watched(state_of(processes), state_of(processes, target=TierSizes(1, 3)))
    running = asyncio.create_task(upkeep.run(client))
    processes.ends.put_nowait(processes.die("expert 0"))
    async with asyncio.timeout(5):
        while sorted(processes.started) != ["expert 0", "expert 2"]:
            await asyncio.sleep(0.001)
    processes.ends.put_nowait(processes.die("expert 1", 2))
    async with asyncio.timeout(5):
        with pytest.raises(ProcessEndedError, match="expert 1"):
            await running


class TestDeaths:
    def test_pauses_double_up_to_the_longest(self) -> None:
        limits = RestartLimits(deaths=9, longest_pause_s=3.0)
        deaths = Deaths(limits, lambda: 0.0)
        assert [deaths.pause_s() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]

    def test_deaths_of_a_ready_process_count_for_a_while(self) -> None:
        now = 0.0
        deaths = Deaths(RestartLimits(deaths=3), lambda: now)
        for _ in range(9):
            deaths.ready()
            assert deaths.pause_s() == 0.5
            now += 61.0
        for pause_s in (0.5, 1.0, None):
            deaths.ready()
            assert deaths.pause_s() == pause_s

    def test_deaths_before_it_is_ready_count_for_as_long_as_that_takes(self) -> None:
        now = 0.0
        deaths = Deaths(RestartLimits(deaths=3), lambda: now)
        for pause_s in (0.5, 1.0, None):
            assert deaths.pause_s() == pause_s
            now += 600.0

    def test_who_is_ended_after_its_rest_is_started_again_and_may_die_once_more(self) -> None:
        now, ends, limits, drawn = 0.0, list[float](), RestartLimits(), random.Random(1)
        deaths = Deaths(limits, lambda: now)
        for _ in range(20):
            now += limits.rest_s(ends, now)
            ends.append(now - LONGEST_END_S * drawn.random())
            deaths.ready()
            assert deaths.pause_s() is not None
        deaths.ready()
        assert deaths.pause_s() is not None
        assert now > 60.0
