"""A running cluster of real processes as its clients, and its processes' peers, reach it by gRPC.

Knows addresses, channels and how any method of any process is called; starts nothing.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor

from attn_service.cluster_upkeep import TICK_S
from moe_core.cluster import AttentionLoad, ClusterState, LinkStats, Role
from moe_core.pb.epserve.v1 import gateway_pb2, gateway_pb2_grpc
from moe_core.service.cluster_codec import cluster_from_pb

DEADLINE_S = 20.0
# What a message about bad input would tell of the program instead.
LEAKS = ("Error", "class", "Traceback", "_pb2", "google.")


@dataclass(frozen=True)
class Usage:
    """Of a cluster with one attention group: its load, and the totals of all links."""

    load: AttentionLoad
    links: tuple[LinkStats, ...]

    @property
    def is_idle(self) -> bool:
        load = self.load
        waiting, free = load.num_running + load.num_waiting, load.free_kv_blocks
        return (waiting, free) == (0, load.total_kv_blocks)

    @property
    def dispatches(self) -> int:
        return sum(link.dispatches for link in self.links)


@dataclass(frozen=True)
class ServedCluster:
    """`addresses` and `channels` by process: "gateway", "attn_0", "expert_1" and so on."""

    stub: Any
    addresses: dict[str, str]
    channels: dict[str, grpc.Channel]

    @property
    def state(self) -> ClusterState:
        return _state(self.stub)

    def generate(self, request: gateway_pb2.GenerateRequest) -> list[int]:
        """All tokens of a request. Raises grpc.RpcError."""
        answers = self.stub.Generate(request, timeout=DEADLINE_S)
        return [token for answer in answers for token in answer.token_ids]

    def send(self, process: str, called: MethodDescriptor, *messages: bytes) -> list[bytes]:
        """The encoded answers of one process to encoded messages. Raises grpc.RpcError."""
        path = f"/{called.containing_service.full_name}/{called.name}"
        channel = self.channels[process]
        if called.client_streaming:
            return list(channel.stream_stream(path)(iter(messages), timeout=DEADLINE_S))
        (message,) = messages
        if called.server_streaming:
            return list(channel.unary_stream(path)(message, timeout=DEADLINE_S))
        return [channel.unary_unary(path)(message, timeout=DEADLINE_S)]

    def settled(self) -> Usage:
        """What the attention tier reports once it reports nothing new."""
        deadline = time.monotonic() + 2 * DEADLINE_S
        usage = _usage(self.state)
        while True:
            time.sleep(2.5 * TICK_S)
            before, usage = usage, _usage(self.state)
            if usage == before:
                return usage
            assert time.monotonic() < deadline, usage


def _usage(state: ClusterState) -> Usage:
    tier = state.tier(Role.ATTN)
    load = tier[0].attention_load
    assert load is not None
    return Usage(load, tuple(link for member in tier for link in member.links))


def greedy(token_ids: Sequence[int], max_tokens: int) -> gateway_pb2.GenerateRequest:
    """Asks for exactly so many of the likeliest tokens."""
    return gateway_pb2.GenerateRequest(
        token_ids=gateway_pb2.TokenIds(ids=token_ids),
        sampling=gateway_pb2.SamplingParams(
            max_tokens=max_tokens, temperature=0.0, ignore_eos=True
        ),
    )


def methods(proto: ModuleType) -> list[MethodDescriptor]:
    """All methods of all services of one generated module."""
    services = proto.DESCRIPTOR.services_by_name.values()
    return [method for service in services for method in service.methods]


def method(proto: ModuleType, service: str, name: str) -> MethodDescriptor:
    found: MethodDescriptor = proto.DESCRIPTOR.services_by_name[service].methods_by_name[name]
    return found


@contextmanager
def refused(code: grpc.StatusCode, *named: str) -> Iterator[None]:
    """The call within must fail with `code` and name what it is told to, and nothing of ours."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    details = caught.value.details()
    assert caught.value.code() is code, details
    for words in named:
        assert words in details
    for leak in LEAKS:
        assert leak not in details


@contextmanager
def connected(target: str) -> Iterator[ServedCluster]:
    """Channels to every process of the cluster whose gateway is at `target`."""
    with ExitStack() as stack:
        stub = gateway_pb2_grpc.GatewayStub(stack.enter_context(grpc.insecure_channel(target)))
        addresses = {
            "gateway" if member.role is Role.GATEWAY else f"{member.role}_{member.rank}": (
                member.address
            )
            for member in _state(stub).members
        }
        channels = {
            name: stack.enter_context(grpc.insecure_channel(address))
            for name, address in addresses.items()
        }
        yield ServedCluster(stub, addresses, channels)


def _state(stub: Any) -> ClusterState:  # noqa: ANN401
    return cluster_from_pb(stub.GetCluster(gateway_pb2.GetClusterRequest(), timeout=DEADLINE_S))
