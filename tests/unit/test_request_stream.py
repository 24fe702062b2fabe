"""The choices of one request as the gateway reads them from a group's stream."""

from gateway.request_stream import Delta, GroupLostError, RequestStream
from moe_core.errors import UnavailableError
from moe_core.parked_kv import ParkedKv
from support.stream_ends import Heard, Link


class Stumbling(Heard):
    def take(self, index: int, delta: Delta) -> None:
        raise RuntimeError("no such token")


def test_what_was_on_its_way_to_a_dropped_choice_concerns_nobody() -> None:
    link, heard = Link("a", "b"), Heard()
    stream = RequestStream(link, {0: "a", 1: "b"}, heard)
    stream.put(0, Delta((5,)))
    stream.drop(0)
    stream.put(0, Delta((6,)))
    stream.fail(0, UnavailableError("the experts are gone"))
    stream.put(1, Delta((7,)))
    assert heard.all == [(0, Delta((5,))), (1, Delta((7,)))]
    assert link.forgotten == ["a"]


def test_the_error_of_one_choice_is_the_requests_and_the_last_that_is_heard() -> None:
    heard = Heard()
    stream = RequestStream(Link("a", "b"), {0: "a", 1: "b"}, heard)
    gone = UnavailableError("the experts are gone")
    stream.put(0, Delta((5,)))
    stream.fail(1, gone)
    stream.put(0, Delta((6,)))
    stream.fail(0, UnavailableError("the link, too"))
    assert heard.all == [(0, Delta((5,))), gone]


def test_what_fails_in_the_taking_is_the_requests_own_failure() -> None:
    heard = Stumbling()
    stream = RequestStream(Link("a"), {0: "a"}, heard)
    stream.put(0, Delta((5,)))
    stream.put(0, Delta((6,)))
    (error,) = heard.all
    assert isinstance(error, RuntimeError)
    assert str(error) == "no such token"


def test_abort_ends_the_choices_that_are_still_running() -> None:
    link, heard = Link("b", "c"), Heard()
    stream = RequestStream(link, {0: "a", 1: "b", 2: "c"}, heard)
    stream.abort()
    assert heard.all == [(1, Delta((), "abort")), (2, Delta((), "abort"))]
    assert link.forgotten == ["b", "c"]


def test_a_group_that_is_left_is_told_at_once() -> None:
    link, heard, reason = Link("b"), Heard(), GroupLostError("it drains")
    stream = RequestStream(link, {0: "a", 1: "b"}, heard)
    stream.put(1, Delta((5,)))
    stream.leave(reason)
    stream.leave(GroupLostError("told twice"))
    assert link.forgotten == ["b"]
    assert heard.all == [(1, Delta((5,))), reason]


def test_a_group_that_hands_over_is_left_once_all_choices_are_parked_or_have_ended() -> None:
    link, heard = Link("a", "b", "c", hands_over=True), Heard()
    stream = RequestStream(link, {0: "a", 1: "b", 2: "c"}, heard)
    reason = GroupLostError("it drains")
    stream.leave(reason)
    assert (link.parking, link.forgotten) == (["a", "b", "c"], [])
    stream.put(0, Delta((5,)))
    link.running.discard("a")
    stream.put_parked(0, ParkedKv(4, (7,)))
    stream.put(1, Delta((6,), "length"))
    link.running.discard("b")
    stream.put(1, Delta((), "length"))
    came = [(0, Delta((5,))), (1, Delta((6,), "length")), (1, Delta((), "length"))]
    assert heard.all == came
    link.running.discard("c")
    stream.put_parked(2, ParkedKv(5, (8,)))
    assert heard.all == [*came, reason]
    assert stream.parked == {0: ParkedKv(4, (7,)), 2: ParkedKv(5, (8,))}


def test_a_choice_that_is_dropped_last_keeps_no_other_from_leaving() -> None:
    link, heard, reason = Link("a", "b", hands_over=True), Heard(), GroupLostError("it drains")
    stream = RequestStream(link, {0: "a", 1: "b"}, heard)
    stream.leave(reason)
    link.running.discard("a")
    stream.put_parked(0, ParkedKv(4, (7,)))
    assert not heard.all
    stream.drop(1)
    assert heard.all == [reason]


def test_a_choice_that_ended_where_it_was_parked_has_nowhere_to_go() -> None:
    link, heard = Link("a", "b", hands_over=True), Heard()
    stream = RequestStream(link, {0: "a", 1: "b"}, heard)
    stream.leave(GroupLostError("it drains"))
    stream.drop(0)
    link.running.clear()
    stream.put_parked(0, ParkedKv(4, (7,)))
    stream.put(1, Delta((5,), "length"))
    assert heard.all == [(1, Delta((5,), "length"))]
