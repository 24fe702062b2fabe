"""What a report says of results, faults and times."""

import json

from rich.console import Console

from epserve.chaos.checker import Outcome, Verdict
from epserve.chaos.faults import Fault, Injected
from epserve.chaos.load import Ended, Results
from epserve.chaos.report import ChaosReport
from epserve.chaos.requests import ChaosRequest
from epserve.chaos.timeline import Timeline
from epserve.generate_messages import Sampling
from moe_core.cluster import Role
from support.chaos_cluster import member

REQUEST = ChaosRequest(7, (1, 2, 3), Sampling(max_tokens=4, temperature=0.0))


def results(*verdicts: Verdict) -> Results:
    found = Results(100.0)
    for index, verdict in enumerate(verdicts):
        found.ended(Ended(f"r{index}", REQUEST, 100.0, 101.0 + index, verdict))
    return found


def report(during: Results, *injected: Injected, missing: tuple[str, ...] = ()) -> ChaosReport:
    before = results(Verdict(Outcome.EXACT))
    return ChaosReport(5, before, during, injected, missing, interrupted=False)


def test_it_counts_every_outcome_and_keeps_messages_and_what_the_same_again_takes():
    during = results(
        Verdict(Outcome.EXACT),
        Verdict(Outcome.ERROR, "expert 1 was lost", "UNAVAILABLE"),
        Verdict(Outcome.WRONG, "choice 0, token 2: 9 came, 8 was due"),
    )
    document = json.loads(json.dumps(report(during).document()))
    assert document["requests"] == {"exact": 1, "error": 1, "wrong": 1, "truncated": 0, "hang": 0}
    assert document["error_codes"] == {"UNAVAILABLE": 1}
    assert document["errors"][0]["detail"] == "expert 1 was lost"
    (broken,) = document["broken"]
    assert (broken["request_id"], broken["at_s"], broken["prompt"]) == ("r2", 3.0, [1, 2, 3])
    assert broken["sampling"] == {"max_tokens": 4, "temperature": 0.0, "ignore_eos": False}
    assert document["held"] is False


def test_errors_do_not_break_the_invariant_and_nothing_tried_does_not_hold():
    assert report(results(Verdict(Outcome.ERROR, "lost", "UNAVAILABLE"))).held
    for outcome in (Outcome.WRONG, Outcome.TRUNCATED, Outcome.HANG):
        assert not report(results(Verdict(Outcome.EXACT), Verdict(outcome))).held
    assert not report(results()).held


def test_each_fault_has_its_stall_and_its_recovery():
    during = results(Verdict(Outcome.EXACT))
    timeline = during.timeline
    timeline.first(100.5, since=100.0, num_tokens=1)
    timeline.later(101.5, before=100.5, num_tokens=2)
    timeline.later(104.5, before=101.5, num_tokens=1)  # over the first fault
    timeline.later(111.0, before=110.5, num_tokens=1)  # over the second
    timeline.ended = 110.0
    killed = Injected(Fault.KILL, member(Role.EXPERT, 1), 102.0, 102.0, ready_at=106.0)
    frozen = Injected(Fault.FREEZE, member(Role.ATTN, 0), 110.0, 110.8)
    first, second = report(during, killed, frozen).document()["faults"]
    assert first == {
        "fault": "kill",
        "member": "expert 1",
        "pid": killed.member.pid,
        "at_s": 2.0,
        "lasted_s": 0.0,
        "next_token_s": 2.5,
        "ready_again_s": 4.0,
        "longest_stall_s": 3.0,
    }
    assert (second["lasted_s"], second["ready_again_s"], second["longest_stall_s"]) == (
        0.8,
        None,
        0.5,
    )


def test_rates_and_spreads_of_a_timeline():
    timeline = Timeline(0.0)
    for at in range(1, 11):
        timeline.later(float(at), at - 0.5, num_tokens=3)
    timeline.ended = 10.0
    assert timeline.tokens_per_s_between(2.0, 4.0) == 3.0
    assert timeline.tokens_per_s_between(4.0, 4.0) == 0.0
    assert timeline.tokens_per_s == 2.7  # the last came as it ended
    assert (timeline.next_after(3.0), timeline.next_after(10.0)) == (1.0, None)
    assert timeline.longest_gap(0.0, 1.0) == 0.0
    timeline.first(11.0, 2.0, num_tokens=1)
    assert (timeline.gaps_across(2.7), timeline.gaps_across(2.2)) == ([0.5], [])


def test_tables_show_what_happened_on_a_narrow_terminal():
    during = results(Verdict(Outcome.HANG, "no end after 5 s"))
    console = Console(width=80, color_system=None)
    killed = Injected(Fault.KILL, member(Role.EXPERT, 1), 102.0, 102.0)
    with console.capture() as capture:
        report(during, killed, missing=("expert 1: not joined",)).print_to(console)
    text = capture.get()
    for words in ("kill", "expert 1", "1 hang", "BROKEN at 1.0 s, request 7: hang: no end after"):
        assert words in text
    assert "not ready at the end: expert 1: not joined" in text
    assert "…" not in text
