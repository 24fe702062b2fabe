"""`epserve chaos`: the quiet passes, the faults under load, and the report.

Knows the order of these. What is drawn, done and checked is in the modules beside this one.
"""

import asyncio
import json
import time
from dataclasses import dataclass

from rich.console import Console

from epserve.chaos.checker import Outcome
from epserve.chaos.faults import Injected
from epserve.chaos.load import Expected, Generates, Load, Results, all_of
from epserve.chaos.nemesis import Nemesis, NemesisSettings, require_seconds
from epserve.chaos.processes import require_local
from epserve.chaos.recovery import Recovery
from epserve.chaos.report import ChaosReport
from epserve.chaos.requests import draw_requests
from epserve.client import EpserveClient
from epserve.gateway_connection import Target
from epserve.resuming import ResumingClient
from epserve.stop_signals import run_until_signalled
from moe_core.cluster import Role
from moe_core.errors import ConfigError, EpserveError, UnavailableError

REQUESTS_PER_PLACE = 4  # distinct ones, for each that may run at a time
# For a request whose gateway was hit to go on at the next: long enough to start one.
MOST_RESUME_S = 30.0
SETTLE_S = 60.0  # for a cluster to be whole again after the last fault


@dataclass(frozen=True, slots=True)
class ChaosSettings:
    """`duration_s`: of the faults. `deadline_s`: of one request; more is a hang. Raises
    ConfigError."""

    nemesis: NemesisSettings
    duration_s: float
    concurrency: int
    max_tokens: int
    deadline_s: float

    def __post_init__(self) -> None:
        for name, value in (("concurrency", self.concurrency), ("max_tokens", self.max_tokens)):
            if value < 1:
                raise ConfigError(name, value, "must be at least 1", [1])
        for name, seconds in (("duration", self.duration_s), ("deadline", self.deadline_s)):
            require_seconds(name, seconds)


class BrokenInvariantError(EpserveError):
    """Tokens were wrong, missing or late without an error: says how often."""


def chaos(target: Target, settings: ChaosSettings, *, as_json: bool) -> None:
    """Print what happens and a report. Raises BrokenInvariantError where the invariant did not
    hold, and EpserveError where it could not be tried, or a signal ended the trial."""
    console = Console(highlight=False, quiet=as_json)
    run = ChaosRun(target, settings, console)
    interrupted = asyncio.run(run_until_signalled(run.work()))
    report = run.report(interrupted=interrupted)
    if report is None:
        raise EpserveError("interrupted before the first fault")
    if as_json:
        print(json.dumps(report.document()))
    else:
        report.print_to(console)
    if report.during.num_broken:
        outcomes = report.during.outcomes
        broken = (Outcome.WRONG, Outcome.TRUNCATED, Outcome.HANG)
        words = ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in broken)
        raise BrokenInvariantError(f"the invariant is broken: {words} of {outcomes.total()}")
    if interrupted:
        raise EpserveError("interrupted; the invariant held until then")
    if not report.held:
        raise EpserveError("no request ended under faults: the invariant was not tried")
    console.print("[bold green]the invariant held[/]")


class ChaosRun:
    """One trial of one cluster. `work` may be cancelled: `report` then says what there was."""

    def __init__(self, target: Target, settings: ChaosSettings, console: Console) -> None:
        self._target = target
        self._settings = settings
        self._console = console
        self._before: Results | None = None
        self._during: Results | None = None
        self._injected: list[Injected] = []
        self._missing: tuple[str, ...] = ()

    def report(self, *, interrupted: bool) -> ChaosReport | None:
        """None before the faults."""
        if self._before is None or self._during is None:
            return None
        return ChaosReport(
            self._settings.nemesis.seed,
            self._before,
            self._during,
            self._injected,
            self._missing,
            interrupted,
        )

    async def work(self) -> None:
        """Raises EpserveError where the trial cannot be made."""
        settings = self._settings
        async with EpserveClient(self._target) as client:
            await self._require_whole(client)
            (model,) = await client.list_models()
            count = REQUESTS_PER_PLACE * settings.concurrency
            seed = settings.nemesis.seed
            requests = draw_requests(model, count, settings.max_tokens, seed)
            load = Load(
                self._generating(client), requests, settings.concurrency, settings.deadline_s
            )
            self._say(f"{count} requests without faults, twice")
            expected = await load.quiet_results()
            before = await load.each_once(expected)
            _require_exact(before)
            self._before = before
            self._say(f"faults for {settings.duration_s:g} s, seed {seed}")
            await self._under_faults(client, load, expected)

    def _generating(self, client: EpserveClient) -> Generates:
        """Whoever loses a gateway resumes; what workers' losses cost is not to be hidden so."""
        if Role.GATEWAY not in self._settings.nemesis.roles:
            return client
        return ResumingClient([client], min(MOST_RESUME_S, self._settings.deadline_s / 2))

    async def _require_whole(self, client: EpserveClient) -> None:
        state = await client.cluster()
        roles = self._settings.nemesis.roles
        require_local(member for role in roles for member in state.tier(role))
        missing = [words for role in Role for words in state.missing(role)]
        if missing:
            raise UnavailableError(f"the cluster is not whole to begin with: {'; '.join(missing)}")

    async def _under_faults(self, client: EpserveClient, load: Load, expected: Expected) -> None:
        results = self._during = Results(time.monotonic())
        nemesis = Nemesis(client, self._settings.nemesis, self._say_fault)
        self._injected = nemesis.injected
        recovery = Recovery(client, nemesis.injected)
        stop = asyncio.Event()

        async def faults() -> None:
            try:
                await nemesis.run(self._settings.duration_s)
                await recovery.until_whole(SETTLE_S)
            finally:
                stop.set()

        watching = asyncio.create_task(recovery.watch())
        try:
            await all_of(faults(), load.until(stop, expected, results))
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            self._missing = recovery.missing

    def _say(self, words: str) -> None:
        self._console.print(words, soft_wrap=True)

    def _say_fault(self, injected: Injected) -> None:
        assert self._during is not None
        at_s = injected.at - self._during.timeline.began
        self._say(f"{at_s:6.1f} s  {injected.fault} {injected.name} (pid {injected.member.pid})")


def _require_exact(before: Results) -> None:
    """Raises UnavailableError: where a quiet cluster does not repeat itself, nothing can be said of
    one with faults."""
    ends = [*before.breaks, *before.errors]
    if ends:
        end = ends[0]
        raise UnavailableError(
            f"without any fault, request {end.request.key} did not end twice alike: "
            f"{end.verdict.outcome}, {end.verdict.detail}; sums in another order give other tokens "
            "in all types but float64: run the cluster with --dtype float64"
        )
