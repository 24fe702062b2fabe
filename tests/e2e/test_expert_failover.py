"""Expert processes that are killed under a running stream, of a cluster started one by one."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import Event

import pytest

from attn_service.cluster_upkeep import EXPERT_LOAD_S
from moe_core.pb.epserve.v1.gateway_pb2 import (
    GenerateRequest,
    GenerateResponse,
    GetClusterRequest,
)
from support.processes import TINY_MODEL, Running, started
from support.served_cluster import ServedCluster, connected, greedy

MODEL = ("--model", str(TINY_MODEL))
NUM_EXPERTS = 16
NUM_TOKENS = 150
PROMPT = (5, 6, 7)
# Several steps' prefill, which the KV cache holds beside each other.
PROMPTS = tuple(tuple(3 + (first + 7 * n) % 400 for n in range(900)) for first in (1, 2))
SHORT = 20
TOP_K, MOE_LAYERS = 4, 3
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
        self.experts: dict[int, Running] = {}
        for rank in range(2):
            self.start_expert(rank)
        self._start("attn", *self._worker(), "--kv-cache-tokens", "2048", "--expert-wait", "20")
        self.gateway.wait_for("event='ready'")

    def start_expert(self, rank: int) -> None:
        self.experts[rank] = self._start("expert", *self._worker(), "--rank", str(rank))

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


def test_a_kill_in_mid_prefill_has_no_token_computed_twice(cluster: Cluster) -> None:
    with connected(cluster.target) as served, ThreadPoolExecutor(len(PROMPTS)) as pool:
        _until(lambda: _num_links(served) == 2)
        before = _routed(served)
        begun = Event()
        asked = [greedy(prompt, SHORT) for prompt in PROMPTS]
        running = [pool.submit(_answers, served, each, begun) for each in asked]
        time.sleep(0.05)
        assert not begun.is_set()  # so it is the prompts that are computed
        cluster.experts[1].send(signal.SIGKILL)
        answers = [each.result() for each in running]
        time.sleep(2 * EXPERT_LOAD_S)
        routed = _routed(served)
        computed = sum(len(prompt) for prompt in PROMPTS) + len(PROMPTS) * (SHORT - 1)
        assert [now - then for now, then in zip(routed, before, strict=True)] == [
            TOP_K * computed
        ] * MOE_LAYERS
        assert all(answer[-1].usage.cached_tokens == 0 for answer in answers)
        tokens = [[token for each in answer for token in each.token_ids] for answer in answers]
        assert tokens == [served.generate(each) for each in asked]  # from the cache, for the most
        cluster.start_expert(1)
        _until(lambda: _num_links(served) == 2)


def _answers(served: ServedCluster, asked: GenerateRequest, begun: Event) -> list[GenerateResponse]:
    """All of one request; `begun` is set when the first comes."""
    found = []
    for answer in served.stub.Generate(asked, timeout=60.0):
        begun.set()
        found.append(answer)
    return found


def _routed(served: ServedCluster) -> list[int]:
    """Of each MoE layer, how often its experts were chosen since the cluster began."""
    asked = GetClusterRequest(expert_load=True)
    layers = served.stub.GetCluster(asked, timeout=10.0).expert_load.layers
    return [sum(layer.tokens) for layer in layers] or [0] * MOE_LAYERS


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


def _num_links(served: ServedCluster) -> int:
    """Of attention, where it misses none."""
    (attention,) = (m for m in served.state.members if m.role.value == "attn")
    return 0 if attention.detail else len(attention.links)


def _until(condition) -> None:  # noqa: ANN001
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
