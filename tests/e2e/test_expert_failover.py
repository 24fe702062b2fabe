"""Expert processes that are killed under a running stream, of a cluster started one by one."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from support.processes import TINY_MODEL, Running, started
from support.served_cluster import ServedCluster, connected, greedy

MODEL = ("--model", str(TINY_MODEL))
NUM_EXPERTS = 16
NUM_TOKENS = 150
PROMPT = (5, 6, 7)
SOON_S = 30.0


class Cluster:
    """A gateway, an attention process and two expert processes that each hold every expert."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        port = _free_port()
        self.target = f"127.0.0.1:{port}"
        self.gateway = self._start(
            *("gateway", *MODEL, "--grpc-port", str(port), "--port", "0"),
            *("--expert-devices", "2", "--ep-size", "2", "--expert-parallel-degree", "2"),
            *("--num-redundant-experts", str(NUM_EXPERTS)),
        )
        self.experts = [self.start_expert(rank) for rank in range(2)]
        self._start("attn", *self._worker(), "--kv-cache-tokens", "2048", "--expert-wait", "20")
        self.gateway.wait_for("event='ready'")

    def start_expert(self, rank: int) -> Running:
        return self._start("expert", *self._worker(), "--rank", str(rank))

    def _worker(self) -> tuple[str, ...]:
        return (
            *MODEL,
            "--gateway",
            self.target,
            "--device",
            "cpu",
            "--dtype",
            "float64",
            "--threads",
            "1",
        )

    def _start(self, *arguments: str) -> Running:
        return self._stack.enter_context(started(*arguments))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(stack)


@contextmanager
def stream(served: ServedCluster, num_tokens: int) -> Iterator[Iterator[int]]:
    """The tokens of a request as they come."""
    call = served.stub.Generate(greedy(PROMPT, num_tokens), timeout=60.0)
    yield (token for answer in call for token in answer.token_ids)


def test_a_stream_goes_on_when_processes_die_and_come_back(cluster: Cluster) -> None:
    with connected(cluster.target) as served:
        expected = served.generate(greedy(PROMPT, NUM_TOKENS))
        assert len(expected) == NUM_TOKENS
        # One of two: its experts have copies.
        with stream(served, NUM_TOKENS) as tokens:
            begun = [next(tokens) for _ in range(20)]
            os.kill(cluster.experts[1].pid, signal.SIGKILL)
            assert [*begun, *tokens] == expected
        _until(lambda: _details(served)[0].startswith("expert 1"))
        assert _states(served)["attn 0"] == "ready"
        assert served.generate(greedy(PROMPT, 50)) == expected[:50]
        # Both: there is no copy left, so the stream waits for one to come back.
        with stream(served, NUM_TOKENS) as tokens:
            begun = [next(tokens) for _ in range(20)]
            os.kill(cluster.experts[0].pid, signal.SIGKILL)
            cluster.start_expert(0)
            assert [*begun, *tokens] == expected
        cluster.start_expert(1)
        _until(lambda: _details(served) == [""])
        assert served.generate(greedy(PROMPT, 50)) == expected[:50]


def _states(served: ServedCluster) -> dict[str, str]:
    return {f"{m.role} {m.rank}": m.state.value for m in served.state.members}


def _details(served: ServedCluster) -> list[str]:
    """What the attention processes say of what they miss."""
    return [m.detail for m in served.state.members if m.role.value == "attn"]


def _until(condition) -> None:  # noqa: ANN001
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
