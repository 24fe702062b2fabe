"""`epserve chaos` against a cluster that survives what is done to it, and where it cannot be."""

import json
import signal
from collections.abc import Iterator

import psutil
import pytest

from epserve.bench.row import NotAvailableError
from epserve.bench.served import command, served
from support.processes import TINY_MODEL, epserve, serving, started

LAYOUT = ("--expert-devices", "2", "--ep-size", "2", "--dtype", "float64")
# Freezes that end before a frozen process is noticed: they only delay.
SHORT = ("--faults", "delay,freeze", "--freeze", "1", "--roles", "expert", "--pause", "0.5")
SMALL = ("--concurrency", "4", "--max-tokens", "16")


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with serving(*LAYOUT, "--kv-cache-tokens", "4096") as (_, target):
        yield target


def pids(target: str) -> list[int]:
    shown = epserve("status", "--target", target, "--json")
    return [member["pid"] for member in json.loads(shown.stdout)["members"]]


def test_delays_cost_no_request_and_change_no_token(target: str):
    before = pids(target)
    ended = epserve("chaos", "--target", target, "--duration", "8", *SHORT, *SMALL, "--json")
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert report["held"] is True
    assert report["requests"].pop("exact") > 0
    assert not any(report["requests"].values()), report
    assert report["faults"]
    for fault in report["faults"]:
        assert fault["member"].startswith("expert ")
        assert fault["ready_again_s"] is not None
    assert pids(target) == before


def test_an_interrupted_run_reports_and_leaves_nobody_stopped(target: str):
    freeze = ("--faults", "freeze", "--freeze", "2", "--roles", "expert", "--pause", "0.1")
    with started("chaos", "--target", target, "--duration", "60", *freeze, *SMALL) as running:
        for _ in range(2):
            running.wait_for("freeze expert")
        running.send(signal.SIGINT)
        assert running.wait() == 1
        assert running.err == ["epserve: interrupted; the invariant held until then"]
        assert any(line.startswith("requests: ") for line in running.out)
    states = {psutil.Process(pid).status() for pid in pids(target)}
    assert psutil.STATUS_STOPPED not in states


def test_chaos_without_a_gateway_is_one_line_and_status_1():
    failed = epserve("chaos", "--target", "127.0.0.1:1")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.count("\n") == 1
    assert "127.0.0.1:1" in failed.stderr


async def test_what_serve_or_a_command_refuses_is_not_available():
    with pytest.raises(NotAvailableError, match="--nonsense"):
        async with served(TINY_MODEL, "--nonsense"):
            pass
    with pytest.raises(NotAvailableError, match="nonsense"):
        await command("nonsense")
