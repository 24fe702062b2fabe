"""No caller is ever given more than its limits, and each refusal says when there is room."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.callers import ANONYMOUS, Caller
from gateway.quotas import Quotas
from gateway.shared_space import SharedSpace
from moe_core.errors import RequestError, TooManyRequestsError
from support.patience import patient

LIMITED = Caller("limited", max_concurrent_requests=2, max_tokens_per_minute=600)


def test_one_request_more_than_allowed_at_a_time_is_refused_until_one_has_ended() -> None:
    quotas = Quotas()
    quotas.enter(LIMITED)
    quotas.enter(LIMITED)
    with pytest.raises(TooManyRequestsError, match=r"limited: 2 requests .* max_concurrent_req"):
        quotas.enter(LIMITED)
    quotas.enter(Caller("other", max_concurrent_requests=1))
    quotas.leave(LIMITED)
    quotas.enter(LIMITED)


def test_tokens_come_back_at_the_rate_and_the_refusal_says_when() -> None:
    quotas = Quotas()
    quotas.reserve(LIMITED, 590, 0.0)
    with pytest.raises(TooManyRequestsError, match=r"10 tokens are left .* may take 30") as caught:
        quotas.reserve(LIMITED, 30, 0.0)
    assert caught.value.retry_after_s == pytest.approx(2.0)
    with pytest.raises(TooManyRequestsError):
        quotas.reserve(LIMITED, 30, 1.9)
    quotas.reserve(LIMITED, 30, 2.0)


def test_a_request_larger_than_a_minutes_tokens_is_told_so() -> None:
    with pytest.raises(RequestError, match=r"may make 601 tokens.*max_tokens_per_minute=600"):
        Quotas().reserve(LIMITED, 601, 0.0)


def test_what_was_not_used_comes_back() -> None:
    quotas = Quotas()
    quotas.reserve(LIMITED, 600, 0.0)
    quotas.put_back(LIMITED, 500, 0.0)
    quotas.reserve(LIMITED, 500, 0.0)


requests = st.tuples(st.floats(0, 20), st.integers(1, 700), st.floats(0, 1))


@patient
@given(st.lists(requests, max_size=60))
def test_never_more_tokens_than_one_minutes_and_the_rate_since(
    sent: list[tuple[float, int, float]],
) -> None:
    quotas, now, used = Quotas(), 0.0, 0
    for pause, most, part in sent:
        now += pause
        try:
            quotas.reserve(LIMITED, most, now)
        except (RequestError, TooManyRequestsError):
            continue
        tokens = int(most * part)
        quotas.put_back(LIMITED, most - tokens, now)
        used += tokens
        assert used <= 600 + now * 10 + 1e-6


@patient
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(1, 40)), max_size=100))
def test_shared_space_is_bounded_and_nobody_with_a_key_fills_it_alone(
    events: list[tuple[int, bool, int]],
) -> None:
    space, held = SharedSpace(100), {who: [0] for who in range(4)}
    for who, comes, amount in events:
        caller = Caller(f"c{who}")
        if comes and space.fits(caller, amount):
            space.take(caller, amount)
            held[who].append(amount)
        elif not comes and len(held[who]) > 1:
            space.give_back(caller, held[who].pop())
        assert space.used == sum(map(sum, held.values())) <= 100
        if space.used <= 50:
            assert space.fits(Caller("new"), 50)
    for who, amounts in held.items():
        space.give_back(Caller(f"c{who}"), sum(amounts))
    assert space.used == 0


def test_one_key_leaves_room_for_another_and_the_anonymous_caller_need_not() -> None:
    space = SharedSpace(8)
    while space.fits(LIMITED, 1):
        space.take(LIMITED, 1)
    assert space.used == 4
    assert space.fits(Caller("other"), 1)
    alone = SharedSpace(8)
    while alone.fits(ANONYMOUS, 1):
        alone.take(ANONYMOUS, 1)
    assert alone.used == 8
