"""How a process that has stopped polling is woken.

Knows unix sockets and one shared byte. Knows no message: a ring says only "look again", so a lost
one costs a poll period, and one too many costs a poll.

A sleeper sets its byte, looks once more, then sleeps; a ringer makes its message visible, then
reads the byte. So one of the two sees the other, and a busy pair never makes a system call.
Both names vanish with their owner (an abstract socket and a memfd): nothing is left behind.
"""

import contextlib
import mmap
import os
import socket
import stat
from collections.abc import Callable
from typing import Protocol

FLAG_BYTES = mmap.PAGESIZE


class Bell(Protocol):
    """The other end's doorbell."""

    def ring(self) -> bool:
        """Wake the owner if it may be parked; True if it was rung."""
        ...

    def close(self) -> None: ...


class Doorbell:
    """This process's own. `fileno()` becomes readable when somebody rings."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind("")  # the kernel picks a free abstract name
        self.flag_fd = os.memfd_create("epserve-parked", os.MFD_CLOEXEC)
        os.ftruncate(self.flag_fd, FLAG_BYTES)
        self._flag = mmap.mmap(self.flag_fd, FLAG_BYTES)

    @property
    def name(self) -> str:
        """Without the leading NUL byte."""
        address: bytes = self._socket.getsockname()
        return address[1:].decode("ascii")

    def fileno(self) -> int:
        return self._socket.fileno()

    def set_parked(self, parked: bool) -> None:
        self._flag[0] = parked

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(16)

    def close(self) -> None:
        self._socket.close()
        self._flag.close()
        os.close(self.flag_fd)


class LocalBell:
    """The doorbell of a process on this host, rung only while its owner is parked."""

    def __init__(self, name: str, pid: int, flag_fd: int) -> None:
        """Raises OSError when the owner is gone or may not be looked at, ValueError when what it
        names is no flag."""
        # What a peer names may be anything: a pipe would block, a short file kill us at the read.
        descriptor = os.open(f"/proc/{pid}/fd/{flag_fd}", os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError(f"descriptor {flag_fd} of process {pid} is no memory")
            self._flag = mmap.mmap(file.fileno(), FLAG_BYTES, prot=mmap.PROT_READ)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._address = b"\0" + name.encode("ascii")

    def ring(self) -> bool:
        if not self._flag[0]:
            return False
        # A full queue means that rings enough wait already, a refused one that the owner is gone,
        # which the stream reports.
        with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
            self._socket.sendto(b"\0", self._address)
        return True

    def close(self) -> None:
        self._socket.close()
        self._flag.close()


class StreamBell:
    """The doorbell of a process elsewhere: a message on the link's gRPC stream. Whether its owner
    is parked cannot be seen from here, so it is always rung."""

    def __init__(self, send: Callable[[], object]) -> None:
        self._send = send

    def ring(self) -> bool:
        self._send()
        return True

    def close(self) -> None:
        """Nothing of its own to close."""
