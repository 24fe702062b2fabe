"""Real epserve processes for end-to-end tests: start, read what they print, leave none behind."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

TINY_MODEL = Path(__file__).parents[2] / "epserve" / "tiny_model"
EPSERVE = (sys.executable, "-P", "-m", "epserve")
OWN_PYTHON = Path(".venv", "bin", "python")  # of a checkout that `make install` was run in
_END_OF_OUTPUT = "\0"


class Running:
    """A started `epserve …`; its stdout and stderr are read as they come. `wrapper`: a command
    that runs the one behind it, as `ip netns exec NAME` does. `tree`: another release's checkout,
    installed there."""

    def __init__(
        self, arguments: Sequence[str], wrapper: Sequence[str] = (), tree: Path | None = None
    ) -> None:
        python = EPSERVE[0] if tree is None else str(tree / OWN_PYTHON)
        self._process = subprocess.Popen(
            [*wrapper, python, *EPSERVE[1:], *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(self._process.stdout, self.out)),
            threading.Thread(target=self._read, args=(self._process.stderr, self.err)),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def family(self) -> list[psutil.Process]:
        """This process and all that it has started."""
        own = psutil.Process(self.pid)
        return [own, *own.children(recursive=True)]

    def wait_for(self, words: str, timeout_s: float = 120.0) -> str:
        """The next line of either stream that holds `words`."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {words!r} within {timeout_s} s in:\n{self}") from None
            if words in line:
                return line
            assert line != _END_OF_OUTPUT, f"ended before it printed {words!r}:\n{self}"

    def wait(self, timeout_s: float = 30.0) -> int:
        """The exit status."""
        status = self._process.wait(timeout_s)
        for reader in self._readers:
            reader.join(timeout_s)
        return status

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def close(self) -> None:
        """End everything that this process has started, and itself."""
        family = self.family() if self._process.poll() is None else []
        for member in family:
            member.kill()
        self.wait()
        psutil.wait_procs(family, timeout=10)

    def __str__(self) -> str:
        return "\n".join(["stdout:", *self.out, "stderr:", *self.err])

    def _read(self, stream: Iterator[str], into: list[str]) -> None:
        for line in stream:
            into.append(line.rstrip("\n"))
            self._lines.put(into[-1])
        stream.close()
        self._lines.put(_END_OF_OUTPUT)


@contextmanager
def started(
    *arguments: str, wrapper: Sequence[str] = (), tree: Path | None = None
) -> Iterator[Running]:
    """`epserve` with these arguments; killed with all its children at the end."""
    running = Running(arguments, wrapper, tree)
    try:
        yield running
    finally:
        running.close()


@contextmanager
def serving(*arguments: str, model: Path = TINY_MODEL) -> Iterator[tuple[Running, str]]:
    """`epserve serve` once it is ready, and the address of its gateway."""
    base = ("serve", "--model", str(model), "--device", "cpu", "--grpc-port", "0", "--port", "0")
    with started(*base, *arguments) as running:
        line = running.wait_for("ready: serving")
        yield running, line.split(" at ")[1].split()[0]


def epserve(*arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run one command to its end. Nothing that it has started may be left by then."""
    command = [*EPSERVE, *arguments]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        finally:
            left = _of_session(process.pid)
            for each in left:
                each.kill()
    assert not left, f"{command} has left {left}"
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _of_session(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session:
                found.append(process)
    return found


def still_alive(processes: Sequence[psutil.Process], timeout_s: float = 10.0) -> list[str]:
    """Those that have not ended in time, in words."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return [f"{process.pid} {' '.join(process.cmdline())}" for process in alive]
