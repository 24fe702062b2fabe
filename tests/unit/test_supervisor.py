"""Supervisor, with small Python programs as children."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from epserve.parent_death import PARENT_PID_VARIABLE
from epserve.supervisor import ChildSpec, ProcessEndedError, Supervisor, describe_status

SLEEP = "import time; time.sleep(60)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "print('deaf', flush=True); time.sleep(60)"
)


def child(name: str, program: str, stop_stage: int = 0) -> ChildSpec:
    return ChildSpec(name, (sys.executable, "-c", program), stop_stage=stop_stage)


class Lines:
    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def __call__(self, name: str, line: str) -> None:
        self.seen.append((name, line))

    async def wait_for(self, line: str) -> None:
        async with asyncio.timeout(10):
            while line not in [text for _, text in self.seen]:
                await asyncio.sleep(0.01)


async def test_leaving_the_context_ends_every_child():
    async with Supervisor([child("a", SLEEP), child("b", SLEEP)], Lines()) as supervisor:
        pids = supervisor.pids
        assert all(psutil.pid_exists(pid) for pid in pids.values())
    assert not any(psutil.pid_exists(pid) for pid in pids.values())


async def test_a_child_that_ends_is_named_with_status_and_last_lines():
    program = "import sys; print('first'); print('no such tensor', file=sys.stderr); sys.exit(3)"
    with pytest.raises(ProcessEndedError) as caught:
        async with Supervisor([child("a", SLEEP), child("expert 1", program)], Lines()) as sup:
            await sup.guard(asyncio.sleep(30))
    message = str(caught.value)
    assert "expert 1 (pid " in message
    assert "exit status 3" in message
    assert "no such tensor" in message
    assert "\n" not in message
    assert caught.value.code == "UNAVAILABLE"


async def test_a_child_that_refused_an_argument_makes_an_invalid_argument():
    with pytest.raises(ProcessEndedError) as caught:
        async with Supervisor([child("attn 0", "raise SystemExit(2)")], Lines()) as supervisor:
            await supervisor.guard(asyncio.sleep(30))
    assert caught.value.code == "INVALID_ARGUMENT"


async def test_a_killed_child_is_named_with_its_signal():
    async with Supervisor([child("attn 0", SLEEP)], Lines()) as supervisor:
        os.kill(supervisor.pids["attn 0"], signal.SIGKILL)
        with pytest.raises(ProcessEndedError, match=r"attn 0 .* signal 9 \(SIGKILL\)"):
            await supervisor.guard(asyncio.sleep(30))


async def test_a_deaf_child_is_killed_after_the_grace_time():
    lines = Lines()
    async with Supervisor([child("a", STUBBORN)], lines, grace_s=0.2) as supervisor:
        await lines.wait_for("deaf")
        pid = supervisor.pids["a"]
        start = time.monotonic()
    assert time.monotonic() - start < 5
    assert not psutil.pid_exists(pid)


async def test_two_cancellations_at_once_leave_a_deaf_child_no_time():
    lines = Lines()

    async def work() -> None:
        async with Supervisor([child("a", STUBBORN)], lines, grace_s=3600) as supervisor:
            await supervisor.guard(asyncio.sleep(3600))

    running = asyncio.create_task(work())
    await lines.wait_for("deaf")
    running.cancel()
    running.cancel()
    async with asyncio.timeout(10):
        await asyncio.wait({running})
    assert running.cancelled()


async def test_a_stop_while_others_are_stopped_does_not_hide_the_child_that_ended():
    lines = Lines()

    async def work() -> None:
        async with Supervisor([child("deaf", STUBBORN), child("b", SLEEP)], lines) as supervisor:
            await lines.wait_for("deaf")
            os.kill(supervisor.pids["b"], signal.SIGKILL)
            asyncio.get_running_loop().call_later(0.5, task.cancel)
            await supervisor.guard(asyncio.sleep(30))

    task = asyncio.create_task(work())
    with pytest.raises(ProcessEndedError, match=r"b \(pid \d+\) was ended by signal 9"):
        await task


async def test_stages_stop_one_after_the_other():
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('bye', flush=True), sys.exit(0)))\n"
        "print('up', flush=True)\n"
        "time.sleep(60)\n"
    )
    lines = Lines()
    specs = [child("late", program, 1), child("early", program, 0)]
    async with Supervisor(specs, lines):
        async with asyncio.timeout(10):
            while len(lines.seen) < 2:
                await asyncio.sleep(0.01)
    assert lines.seen[2:] == [("early", "bye"), ("late", "bye")]


async def test_output_is_relayed_line_by_line_with_the_childs_name():
    program = "import sys; sys.stdout.write('50%\\r100%\\nlast line without an end')"
    lines = Lines()
    async with Supervisor([child("x", program)], lines):
        await lines.wait_for("last line without an end")
    assert lines.seen == [("x", "100%"), ("x", "last line without an end")]


async def test_a_child_gets_our_environment_without_our_settings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EPSERVE_DP_SIZE", "2")
    monkeypatch.setenv("EPSERVE_CONFIG", "cluster.yaml")
    monkeypatch.setenv("OTHER_VARIABLE", "kept")
    program = (
        "import os; names = {'OTHER_VARIABLE', *(n for n in os.environ if 'EPSERVE' in n)};"
        "print(sorted((name, os.environ[name]) for name in names))"
    )
    command = (sys.executable, "-c", program)
    lines = Lines()
    found = [(PARENT_PID_VARIABLE, str(os.getpid())), ("EPSERVE_RANK", "1")]
    async with Supervisor([ChildSpec("x", command, {"EPSERVE_RANK": "1"})], lines):
        await lines.wait_for(str([*found, ("OTHER_VARIABLE", "kept")]))


async def test_a_command_that_cannot_be_started_stops_the_others():
    lines = Lines()
    supervisor = Supervisor([child("a", SLEEP), ChildSpec("b", ("/nonexistent/program",))], lines)
    with pytest.raises(FileNotFoundError):
        await supervisor.__aenter__()
    assert not any(psutil.pid_exists(pid) for pid in supervisor.pids.values())


async def test_guard_hands_on_result_and_error_of_the_work():
    async def fails() -> None:
        raise ConnectionError("work failed")

    async with Supervisor([child("a", SLEEP)], Lines()) as supervisor:
        assert await supervisor.guard(asyncio.sleep(0, result=7)) == 7
        with pytest.raises(ConnectionError, match="work failed"):
            await supervisor.guard(fails())


async def test_a_child_that_has_ended_can_be_started_again_under_its_name():
    async with Supervisor([child("a", SLEEP), child("b", SLEEP)], Lines()) as supervisor:
        first = supervisor.pids["a"]
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(10):
            end = await supervisor.next_end()
        assert (end.name, end.pid, end.status) == ("a", first, -9)
        supervisor.forget(end)
        assert list(supervisor.pids) == ["b"]
        await supervisor.start(child("a", SLEEP))
        pids = supervisor.pids
        assert pids["a"] != first
    assert not any(psutil.pid_exists(pid) for pid in pids.values())


async def test_one_child_can_be_ended_alone_and_is_killed_if_it_is_deaf(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("epserve.supervisor._END_GRACE_S", 0.2)
    lines = Lines()
    async with Supervisor([child("deaf", STUBBORN), child("b", SLEEP)], lines) as supervisor:
        await lines.wait_for("deaf")
        supervisor.end("deaf")
        async with asyncio.timeout(10):
            end = await supervisor.next_end()
        assert (end.name, end.status) == ("deaf", -signal.SIGKILL)
        assert psutil.pid_exists(supervisor.pids["b"])


async def test_ends_are_told_one_by_one():
    specs = [child(name, f"raise SystemExit({status})") for name, status in (("a", 3), ("b", 4))]
    async with Supervisor(specs, Lines()) as supervisor, asyncio.timeout(10):
        ends = [await supervisor.next_end() for _ in specs]
    assert {(end.name, end.status) for end in ends} == {("a", 3), ("b", 4)}


async def test_a_start_that_is_cancelled_leaves_no_child():
    before = psutil.Process().children()  # of other tests
    async with Supervisor([], Lines()) as supervisor:
        starting = asyncio.create_task(supervisor.start(child("a", SLEEP)))
        await asyncio.sleep(0.005)  # it is under way
        starting.cancel()
        await asyncio.wait({starting})
        started = [each for each in psutil.Process().children() if each not in before]
        assert len(started) == len(supervisor.pids)


def test_statuses_are_described_in_words():
    assert describe_status(2) == "ended with exit status 2"
    assert describe_status(-9) == "was ended by signal 9 (SIGKILL)"


def test_a_child_dies_with_its_killed_parent():
    child_program = (
        "from epserve.parent_death import die_with_parent; die_with_parent();"
        "import time; print('bound', flush=True); time.sleep(60)"
    )
    parent_program = (
        "import os, subprocess, sys, time\n"
        f"env = {{**os.environ, '{PARENT_PID_VARIABLE}': str(os.getpid())}}\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child_program!r}], env=env,"
        " stdout=subprocess.PIPE)\n"
        "p.stdout.readline()\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent_program], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        grandchild = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    _, alive = psutil.wait_procs([grandchild], timeout=10)
    assert not alive


def test_a_child_whose_parent_is_already_gone_does_not_start():
    program = "from epserve.parent_death import die_with_parent; die_with_parent(); print('ran')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, PARENT_PID_VARIABLE: "1"},
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == b""
