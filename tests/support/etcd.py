"""A real etcd for the tests that need one: Debian's etcd-server."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_core.service.addresses import bound_socket


class Etcd:
    """One etcd on this machine; its data outlive `stop`."""

    def __init__(self, data: Path) -> None:
        self._data = data
        with bound_socket("127.0.0.1", 0) as client, bound_socket("127.0.0.1", 0) as peer:
            self._port, self._peer_port = client.getsockname()[1], peer.getsockname()[1]
        self.registry = f"etcd://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        client, peer = (f"http://127.0.0.1:{port}" for port in (self._port, self._peer_port))
        self._process = subprocess.Popen(
            [
                *("etcd", "--data-dir", str(self._data), "--initial-cluster", f"default={peer}"),
                *("--listen-client-urls", client, "--advertise-client-urls", client),
                *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "GOMAXPROCS": "1"},
        )
        deadline = time.monotonic() + 30
        while not self._is_healthy():
            assert time.monotonic() < deadline, "etcd did not come up within 30 s"
            assert self._process.poll() is None, "etcd has ended"
            time.sleep(0.1)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self._port}/health", timeout=1
            ) as answer:
                return b'"true"' in answer.read()
        except OSError:
            return False


@contextmanager
def running_etcd() -> Iterator[Etcd]:
    if shutil.which("etcd") is None:
        pytest.skip("needs etcd: apt-get install etcd-server")
    with tempfile.TemporaryDirectory() as data:
        etcd = Etcd(Path(data))
        etcd.start()
        try:
            yield etcd
        finally:
            etcd.stop()
