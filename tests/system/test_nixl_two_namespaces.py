"""NIXL between two network namespaces, as between two hosts: UCX over TCP, doorbells over gRPC."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from support.exchange_ends import SPEC
from support.exchange_peer import ENVIRONMENT, ROOT, PeerProcess
from support.namespaces import run, skip_without_namespaces

DISPATCHES = 100
EXPERT_IP, ATTENTION_IP = "10.213.7.1", "10.213.7.2"


@dataclass(frozen=True)
class Namespace:
    name: str

    @property
    def wrapper(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name, "env", "UCX_TLS=tcp")


@pytest.fixture
def namespaces() -> Iterator[tuple[Namespace, Namespace]]:
    skip_without_namespaces()
    pair = Namespace(f"epserve-e{os.getpid()}"), Namespace(f"epserve-a{os.getpid()}")
    names = [namespace.name for namespace in pair]
    try:
        for name in names:
            run("ip", "netns", "add", name)
        veth = ["type", "veth", "peer", "name", "eth0", "netns", names[1]]
        run("ip", "link", "add", "eth0", "netns", names[0], *veth)
        for name, address in zip(names, (EXPERT_IP, ATTENTION_IP), strict=True):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
        yield pair
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_dispatches_cross_by_nixl_and_the_streams_carry_doorbells_only(
    namespaces: tuple[Namespace, Namespace],
):
    expert, attention = namespaces
    with PeerProcess("nixl", host=EXPERT_IP, wrapper=expert.wrapper) as peer:
        module = (sys.executable, "-m", "support.exchange_driver")
        finished = subprocess.run(
            [*attention.wrapper, *module, peer.address, "nixl", str(DISPATCHES)],
            cwd=ROOT / "tests",
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert finished.returncode == 0, finished.stderr
    counters = json.loads(finished.stdout)
    payload = DISPATCHES * SPEC.slot_tokens * SPEC.hidden_size * SPEC.dtype.itemsize
    assert counters["transport"] == "nixl"
    assert counters["dispatches"] == DISPATCHES
    assert (counters["dispatch_bytes"], counters["combine_bytes"]) == (payload, payload)
    assert counters["stream_tensor_bytes"] == 0
    # And what the expert writes is doorbells too, for a link takes nothing else.
    assert set(counters["written"]) == {"doorbell"}
    assert counters["doorbells"] >= DISPATCHES
