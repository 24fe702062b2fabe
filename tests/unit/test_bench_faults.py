"""`epserve bench faults`: its rows, their figures, and what becomes of one without any."""

import json
from pathlib import Path

import pytest

from epserve.bench import faults
from epserve.bench.faults import ROWS, answer, bench_faults, rows_named, table
from epserve.bench.row import BenchSettings, Measured, NotAvailableError, Row
from epserve.bench.skew import imbalance
from moe_core.cluster import ExpertLoad
from moe_core.errors import ConfigError, EpserveError, UnavailableError
from moe_core.placement import ExpertPlacement, LayerPlacement

SETTINGS = BenchSettings(Path("/models/m"), 1)


def row(name: str, result: Measured | Exception) -> Row:
    async def measure(settings: BenchSettings) -> Measured:
        if isinstance(result, Exception):
            raise result
        return result

    return Row(name, f"fault of {name}", "a goal", measure)


MET = row("met", Measured(True, {"stall_s": 0.12345, "failed_requests": 0}))
MISSED = row("missed", Measured(False, {"until_noticed_s": None}))
REFUSED = row("refused", NotAvailableError("No such option: --hedge-after"))
DIED = row("died", UnavailableError("the cluster is not whole after 60 s"))


@pytest.mark.parametrize(
    ("asked", "result", "words"),
    [
        (MET, "pass", "stall_s 0.123, failed_requests 0"),
        (MISSED, "fail", "until_noticed_s none"),
        (REFUSED, "not available", "No such option: --hedge-after"),
        (DIED, "fail", "the cluster is not whole after 60 s"),
    ],
)
async def test_a_row_passes_only_with_figures_that_meet_its_goal(
    asked: Row, result: str, words: str
):
    found = await answer(asked, SETTINGS)
    assert (found.result, found.words) == (result, words)
    assert found.document()["result"] == result


def test_each_row_is_a_line_of_json_and_missed_goals_are_an_error(
    capsys: pytest.CaptureFixture[str],
):
    bench_faults(SETTINGS, (MET, REFUSED), as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["result"] for line in lines] == ["pass", "not available"]
    assert lines[0]["measured"] == {"stall_s": 0.12345, "failed_requests": 0}
    assert lines[1]["measured"] is None
    with pytest.raises(EpserveError, match="missed: missed, died"):
        bench_faults(SETTINGS, (MISSED, DIED, MET), as_json=True)


async def test_the_table_is_markdown_with_fault_goal_and_result():
    died = row("died", UnavailableError("expert 1: last said: a |\n b"))
    lines = table([await answer(MET, SETTINGS), await answer(died, SETTINGS)]).splitlines()
    assert lines[2:] == [
        "| met | fault of met | a goal | stall_s 0.123, failed_requests 0 | pass |",
        "| died | fault of died | a goal | expert 1: last said: a \\| b | fail |",
    ]


def test_rows_are_chosen_by_name():
    assert rows_named(None) == ROWS
    assert [each.name for each in rows_named("skew, expert-killed")] == ["expert-killed", "skew"]
    assert len({each.name for each in ROWS}) == len(ROWS)
    with pytest.raises(ConfigError, match="'quake' is none of them"):
        rows_named("skew,quake")


def test_imbalance_is_of_what_came_between_and_shares_out_copies():
    # Expert 0 is on both groups, expert 1 on the first, expert 2 on the second.
    layer = LayerPlacement(1, (0, 1, 0, 2), (0, 0, 1, 1))
    placement = ExpertPlacement(0, 3, 2, (layer,))
    then = ExpertLoad((1,), ((100, 5, 50),))
    now = ExpertLoad((1,), ((110, 5, 80),))
    assert imbalance(then, now, placement) == pytest.approx(35 / 20)
    assert imbalance(None, ExpertLoad((1,), ((10, 0, 0),)), placement) == pytest.approx(1.0)
    assert imbalance(now, now, placement) == 1.0


def test_rows_of_the_bench_state_a_goal():
    assert all(each.fault and each.goal for each in faults.ROWS)
