"""Network namespaces, as other hosts: what they need, and how one is cut off.

Knows iproute2. Knows no process that runs in one.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

HERE_IP, THERE_IP = "10.213.8.1", "10.213.8.2"


def skip_without_namespaces() -> None:
    """Skips the test, with the reason, where none can be made."""
    reason = _missing()
    if reason:
        pytest.skip(reason)


def _missing() -> str:
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if shutil.which("ip") is None:
        return "needs iproute2 (the ip command)"
    made = subprocess.run(["ip", "netns", "add", "epserve-try"], capture_output=True, text=True)
    if made.returncode != 0:
        return f"needs a kernel that lets it make network namespaces: {made.stderr.strip()}"
    run("ip", "netns", "delete", "epserve-try")
    return ""


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class OtherHost:
    """A namespace at THERE_IP, which reaches this one at HERE_IP and nobody else."""

    name: str

    @property
    def wrapper(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """Every packet to and from it is dropped meanwhile; neither end of a connection is told."""
        run("ip", "-n", self.name, "link", "set", "eth0", "down")
        try:
            yield
        finally:
            run("ip", "-n", self.name, "link", "set", "eth0", "up")


@contextmanager
def other_host() -> Iterator[OtherHost]:
    """Skips the test where none can be made."""
    skip_without_namespaces()
    name, here = f"epserve-o{os.getpid()}", f"ep{os.getpid()}"
    try:
        run("ip", "netns", "add", name)
        run("ip", "link", "add", here, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "address", "add", f"{HERE_IP}/24", "dev", here)
        run("ip", "link", "set", here, "up")
        run("ip", "-n", name, "address", "add", f"{THERE_IP}/24", "dev", "eth0")
        run("ip", "-n", name, "link", "set", "eth0", "up")
        run("ip", "-n", name, "link", "set", "lo", "up")
        yield OtherHost(name)
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
