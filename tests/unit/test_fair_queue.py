"""Shares follow weights whatever arrives, nobody starves, nobody saves up."""

from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.callers import Caller
from gateway.fair_queue import FairQueue
from support.patience import patient

A, B = Caller("a"), Caller("b")
SEATS = 8


class Tier:
    """Runs up to SEATS requests, a token of each per step, and takes the next from a FairQueue."""

    def __init__(self) -> None:
        self.queue: FairQueue[tuple[int, Caller, int, int]] = FairQueue()
        self.served: Counter[str] = Counter()
        self.num_waiting: Counter[str] = Counter()
        self._running: deque[tuple[Caller, int]] = deque()
        self._count = 0

    def send(self, caller: Caller, prompt: int, outputs: int) -> None:
        self._count += 1
        self.num_waiting[caller.name] += 1
        self.queue.push(caller, (self._count, caller, prompt, outputs))

    def step(self) -> None:
        while len(self._running) < SEATS and (item := self.queue.peek()) is not None:
            self.queue.remove(item)
            _, caller, prompt, outputs = item
            self.num_waiting[caller.name] -= 1
            self._serve(caller, prompt)
            self._running.append((caller, outputs))
        for _ in range(len(self._running)):
            caller, left = self._running.popleft()
            self._serve(caller, 1)
            if left > 1:
                self._running.append((caller, left - 1))

    def _serve(self, caller: Caller, tokens: int) -> None:
        self.served[caller.name] += tokens
        self.queue.charge(caller, tokens)


def jain(shares: list[float]) -> float:
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


@settings(patient, max_examples=25)
@given(
    flood=st.integers(20, 60),
    long_outputs=st.integers(1, 60),
    long_prompt=st.integers(1, 100),
    weight=st.sampled_from([1.0, 2.0, 5.0]),
)
def test_tokens_follow_weights_however_unlike_the_requests_are(
    flood: int, long_outputs: int, long_prompt: int, weight: float
) -> None:
    heavy, light, tier = Caller("heavy", weight), Caller("light"), Tier()
    for _ in range(600):
        for _ in range(flood):  # always far more than the other has
            if len(tier.queue) < 10 * flood:
                tier.send(light, long_prompt, long_outputs)
        while tier.num_waiting[heavy.name] < 2 * SEATS:
            tier.send(heavy, 3, 5)
        tier.step()
    assert jain([tier.served["heavy"] / weight, tier.served["light"]]) >= 0.95
    assert tier.served["heavy"] / weight == pytest.approx(tier.served["light"], rel=0.35)


@patient
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 50), st.integers(1, 50)), min_size=1))
def test_everything_that_was_queued_is_served(sent: list[tuple[int, int, int]]) -> None:
    tier = Tier()
    for who, prompt, outputs in sent:
        tier.send(Caller(f"c{who}"), prompt, outputs)
    for _ in range(50 * len(sent)):
        tier.step()
    assert len(tier.queue) == 0
    assert sum(tier.served.values()) == sum(prompt + outputs for _, prompt, outputs in sent)


def test_a_flood_does_not_hold_up_the_first_request_of_another() -> None:
    queue: FairQueue[str] = FairQueue()
    for index in range(100):
        queue.push(A, f"a{index}")
    queue.remove("a0")
    queue.charge(A, 10)
    queue.push(B, "b0")
    queue.remove("a1")
    queue.charge(A, 1)
    assert queue.peek() == "b0"


def test_who_was_idle_has_saved_up_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push(B, "b0")
    queue.remove("b0")
    queue.push(A, "a0")
    queue.charge(A, 10_000)
    queue.push(A, "a1")
    queue.push(B, "b1")
    queue.charge(B, 1)
    assert queue.peek() == "a0"


def test_who_was_served_while_nobody_waited_is_not_overtaken_by_who_comes_first() -> None:
    queue: FairQueue[str] = FairQueue()
    for caller, item in ((B, "b0"), (A, "a0")):
        queue.push(caller, item)
        queue.remove(item)
    queue.charge(A, 10_000)
    queue.push(B, "b1")
    queue.push(A, "a1")
    queue.charge(B, 1)
    assert queue.peek() == "a1"


def test_within_a_caller_priority_comes_before_arrival() -> None:
    queue: FairQueue[str] = FairQueue()
    for item, priority in (("late", 5), ("first", 0), ("second", 0), ("urgent", -1)):
        queue.push(A, item, priority)
    order = []
    while (item := queue.peek()) is not None:
        order.append(item)
        queue.remove(item)
    assert order == ["urgent", "first", "second", "late"]


def test_who_leaves_the_queue_is_not_called() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push(A, "a0")
    queue.push(B, "b0")
    queue.remove("a0")
    queue.remove("a0")
    assert (queue.peek(), len(queue)) == ("b0", 1)
