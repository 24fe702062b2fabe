"""The load of a chaos run: so many requests at a time, each checked against its quiet result.

Knows the client, the requests and the checker. Knows nothing of faults: what they do to a request
is an outcome like any other.
"""

import asyncio
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from epserve.chaos.checker import Completion, Gathered, Outcome, StreamChecker, Verdict
from epserve.chaos.requests import ChaosRequest
from epserve.chaos.timeline import Timeline
from epserve.generate_messages import Output, Sampling
from moe_core.errors import EpserveError, UnavailableError

AFTER_ERROR_S = 0.2  # what fails at once must not be asked again at once
MOST_KEPT = 200  # of errors and of breaks; they are counted beyond
Expected = Sequence[tuple[Completion, ...]]
"""The quiet result of each request, by its key."""


class Generates(Protocol):
    """What the load needs of an EpserveClient."""

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        *,
        request_id: str = "",
        idle_timeout_s: float = 120.0,
    ) -> AsyncIterator[Output]: ...


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that has ended. Times in seconds of time.monotonic()."""

    request_id: str
    request: ChaosRequest
    sent_at: float
    at: float
    verdict: Verdict


class Results:
    """How the requests of one phase ended."""

    def __init__(self, began: float) -> None:
        self.timeline = Timeline(began)
        self.outcomes: Counter[Outcome] = Counter()
        self.error_codes: Counter[str] = Counter()
        self.errors: list[Ended] = []  # the first MOST_KEPT
        self.breaks: list[Ended] = []  # likewise

    def ended(self, end: Ended) -> None:
        verdict = end.verdict
        self.outcomes[verdict.outcome] += 1
        if verdict.outcome is Outcome.ERROR:
            self.error_codes[verdict.code] += 1
        if verdict.outcome is not Outcome.EXACT:
            kept = self.breaks if verdict.breaks else self.errors
            if len(kept) < MOST_KEPT:
                kept.append(end)

    @property
    def num_broken(self) -> int:
        good = self.outcomes[Outcome.EXACT] + self.outcomes[Outcome.ERROR]
        return self.outcomes.total() - good


class Load:
    """`concurrency` requests at a time; one that has not ended after `deadline_s` hangs."""

    def __init__(
        self,
        client: Generates,
        requests: Sequence[ChaosRequest],
        concurrency: int,
        deadline_s: float,
    ) -> None:
        self._client = client
        self._requests = requests
        self._concurrency = concurrency
        self._deadline_s = deadline_s

    async def quiet_results(self) -> Expected:
        """Each request once, undisturbed. Raises what any of them is refused with."""
        waiting = iter(self._requests)
        found: dict[int, tuple[Completion, ...]] = {}

        async def worker() -> None:
            for request in waiting:
                found[request.key] = await self._quiet_result(request)

        await all_of(*(worker() for _ in range(self._concurrency)))
        return [found[request.key] for request in self._requests]

    async def each_once(self, expected: Expected) -> Results:
        """Each request once, checked."""
        waiting = iter(self._requests)
        results = Results(time.monotonic())

        async def worker() -> None:
            for request in waiting:
                await self._checked(request, expected[request.key], results)

        await self._work(worker, results)
        return results

    async def until(self, stop: asyncio.Event, expected: Expected, results: Results) -> None:
        """Requests in any order until `stop` is set; those that have begun then still end."""
        drawn = random.Random(len(self._requests))

        async def worker() -> None:
            while not stop.is_set():
                request = drawn.choice(self._requests)
                await self._checked(request, expected[request.key], results)

        await self._work(worker, results)

    async def _work(
        self, worker: Callable[[], Coroutine[None, None, None]], results: Results
    ) -> None:
        try:
            await all_of(*(worker() for _ in range(self._concurrency)))
        finally:
            results.timeline.ended = time.monotonic()

    async def _quiet_result(self, request: ChaosRequest) -> tuple[Completion, ...]:
        gathered = Gathered(request.num_choices)
        try:
            async with asyncio.timeout(self._deadline_s):
                async for output in self._client.generate(request.prompt, request.sampling):
                    gathered.push(output)
        except TimeoutError:
            raise UnavailableError(
                f"without any fault, request {request.key} has not ended after "
                f"{self._deadline_s:g} s"
            ) from None
        completions = gathered.completions()
        if completions is None:
            raise UnavailableError(f"request {request.key} was cut short without any fault")
        return completions

    async def _checked(
        self, request: ChaosRequest, expected: tuple[Completion, ...], results: Results
    ) -> None:
        request_id = f"chaos-{uuid.uuid4().hex}"
        sent_at = time.monotonic()
        verdict = await self._verdict(request, request_id, expected, results.timeline)
        results.ended(Ended(request_id, request, sent_at, time.monotonic(), verdict))
        if verdict.outcome is not Outcome.EXACT:
            await asyncio.sleep(AFTER_ERROR_S)

    async def _verdict(
        self,
        request: ChaosRequest,
        request_id: str,
        expected: tuple[Completion, ...],
        timeline: Timeline,
    ) -> Verdict:
        checker = StreamChecker(request_id, expected)
        arrivals = _Arrivals(timeline)
        try:
            async with (
                asyncio.timeout(self._deadline_s),
                aclosing(self._stream(request, request_id)) as outputs,
            ):
                async for output in outputs:
                    arrivals.note(output)
                    verdict = checker.push(output)
                    if verdict is not None:
                        return verdict
                return checker.end()
        except TimeoutError:
            so_far = f"{checker.num_tokens} tokens had come"
            return Verdict(Outcome.HANG, f"no end after {self._deadline_s:g} s; {so_far}")
        except EpserveError as error:
            return Verdict(Outcome.ERROR, str(error), error.code)

    def _stream(self, request: ChaosRequest, request_id: str) -> AsyncGenerator[Output, None]:
        """The outputs of one request. A client that can resume a lost stream does it by itself."""
        # The deadline is this side's own: the client's patience must not end before it.
        patience_s = 2 * self._deadline_s
        outputs = self._client.generate(
            request.prompt, request.sampling, request_id=request_id, idle_timeout_s=patience_s
        )
        assert isinstance(outputs, AsyncGenerator)
        return outputs


async def all_of(*work: Coroutine[None, None, None]) -> None:
    """All of them to their ends; where one fails, the others are cancelled and its error raised."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Arrivals:
    """Writes down when one request's tokens come."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._sent = time.monotonic()
        self._last: dict[int, float] = {}

    def note(self, output: Output) -> None:
        if not output.token_ids:
            return
        now, count = time.monotonic(), len(output.token_ids)
        if output.index in self._last:
            self._timeline.later(now, self._last[output.index], count)
        else:
            self._timeline.first(now, self._sent, count)
        self._last[output.index] = now
