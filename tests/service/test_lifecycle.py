"""Signals, exit statuses and what is said on stderr, of a real process."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "service_script.py"
ROOT = SCRIPT.parents[2]
DEADLINE_S = 20


@contextmanager
def scripted(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    while (said := process.stdout.readline()) != f"{line}\n":
        assert said, "the process has ended"


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=DEADLINE_S)
    return process.returncode, stdout, stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_drains_and_is_success(number: signal.Signals) -> None:
    with scripted("serves") as process:
        wait_for(process, "serving")
        process.send_signal(number)
        status, stdout, _ = finish(process)
    assert (status, stdout) == (0, "draining\ndrained\n")


def test_being_asked_to_leave_drains_and_is_success() -> None:
    with scripted("asked to leave") as process:
        status, stdout, _ = finish(process)
    assert (status, stdout) == (0, "serving\ndraining\ndrained\n")


def test_what_cannot_be_asked_any_more_has_failed() -> None:
    with scripted("lost while serving") as process:
        status, stdout, stderr = finish(process)
    assert (status, stderr) == (1, "epserve scripted: lost its place in the cluster\n")
    assert stdout == "serving\ndraining\ndrained\n"


def test_second_signal_leaves_at_once() -> None:
    with scripted("stuck") as process:
        wait_for(process, "serving")
        process.send_signal(signal.SIGTERM)
        wait_for(process, "draining")
        process.send_signal(signal.SIGTERM)
        status, stdout, _ = finish(process)
    assert (status, stdout) == (1, "")


def test_drain_that_does_not_end_is_cut_short_and_no_success() -> None:
    with scripted("stuck", "--short") as process:
        wait_for(process, "serving")
        process.send_signal(signal.SIGTERM)
        status, _, stderr = finish(process)
    assert status == 1
    assert "within 0.3 s" in stderr


def test_signal_while_a_thread_loads_does_not_wait_for_the_thread() -> None:
    with scripted("loads") as process:
        wait_for(process, "loading")
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        finish(process)
    assert time.monotonic() - started < 10


def test_refused_setting_is_one_line_and_status_2() -> None:
    with scripted("refused") as process:
        status, stdout, stderr = finish(process)
    assert status == 2
    assert stderr == "epserve scripted: port=1: must be something else; nearest valid: 2\n"
    assert stdout == "draining\ndrained\n"


def test_failure_is_one_line_and_status_1() -> None:
    with scripted("fails") as process:
        status, stdout, stderr = finish(process)
    assert (status, stderr) == (1, "epserve scripted: the gateway has left\n")
    assert stdout == "draining\ndrained\n"


@pytest.mark.parametrize("behaviour", ["cancelled", "cancelled later"])
def test_work_that_cancels_itself_has_failed(behaviour: str) -> None:
    """As grpc.aio's calls do where the program that makes the requests has a bug."""
    with scripted(behaviour) as process:
        status, _, stderr = finish(process)
    assert status == 1
    assert stderr == "epserve scripted: internal error: its work was cancelled from within\n"


def test_bug_is_one_line_without_debug_and_has_its_traceback_with_it() -> None:
    with scripted("bug") as process:
        status, _, stderr = finish(process)
    assert (status, stderr) == (1, "epserve scripted: internal error: KeyError: 'lost'\n")
    with scripted("bug", "--debug") as process:
        status, _, stderr = finish(process)
    assert status == 1
    assert "Traceback" in stderr


def test_work_that_ends_by_itself_is_success() -> None:
    with scripted("returns") as process:
        status, _, stderr = finish(process)
    assert (status, stderr) == (0, "")
