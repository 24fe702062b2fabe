"""Only processes of the cluster, on this machine, are signalled."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from epserve.chaos.processes import LocalProcess, NotThereError, require_local
from moe_core.cluster import Member, Role
from moe_core.errors import ConfigError, UnavailableError
from support.chaos_cluster import member


@contextmanager
def process(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Sleeps, with these words in its command line, which is its own once it has said a word."""
    code = "import time; print(flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            yield child
        finally:
            child.kill()


def member_of(child: subprocess.Popen[bytes]) -> Member:
    return replace(member(Role.EXPERT, 1), pid=child.pid, instance_epoch=time.time_ns())


def test_a_member_process_is_signalled():
    with (
        process("/somewhere/bin/epserve", "--debug", "expert") as child,
        LocalProcess(member_of(child)) as held,
    ):
        held.send(signal.SIGTERM)
        assert child.wait(10) == -signal.SIGTERM
        with pytest.raises(NotThereError, match=r"expert 1 .* has ended"):
            held.send(signal.SIGKILL)


@pytest.mark.parametrize("words", [(), ("epserve", "attn"), ("expert",), ("expert", "epserve")])
def test_a_process_that_is_not_this_member_is_left_alone(words: tuple[str, ...]):
    with process(*words) as child:
        with pytest.raises(NotThereError, match="not epserve expert; left alone"):
            LocalProcess(member_of(child))
        assert child.poll() is None


def test_a_pid_that_was_given_to_another_since_is_left_alone():
    with process("epserve", "expert") as child:
        earlier = replace(member_of(child), instance_epoch=time.time_ns() - 60 * 10**9)
        with pytest.raises(NotThereError, match="was started after the member joined"):
            LocalProcess(earlier)


def test_a_process_that_has_ended_is_not_there():
    with process("epserve", "expert") as child:
        of = member_of(child)
    with pytest.raises(NotThereError, match="has ended"):
        LocalProcess(of)


def test_a_process_of_another_user_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch):
    def refuse(pidfd: int, number: int) -> None:
        raise PermissionError

    with process("epserve", "expert") as child, LocalProcess(member_of(child)) as held:
        monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
        with pytest.raises(UnavailableError, match="may not send it SIGKILL"):
            held.send(signal.SIGKILL)


def test_no_descriptor_is_left_open():
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with process() as child, pytest.raises(NotThereError):
        LocalProcess(member_of(child))
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_member_elsewhere_is_refused_by_name():
    elsewhere = replace(member(Role.ATTN, 3), host_id="elsewhere", address="10.0.0.9:4000")
    with pytest.raises(
        ConfigError, match=r"attn 3 at 10.0.0.9:4000.*not a process of this machine"
    ):
        require_local([member(Role.EXPERT, 0), elsewhere])
