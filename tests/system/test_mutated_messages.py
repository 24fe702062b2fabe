"""100,000 messages that were made wrong, to one running cluster: each is answered, by a status that
says what is the matter, no process ends or grows, and a good request is served right afterwards.
"""

import asyncio
import collections
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import grpc.aio
import pytest
import torch
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.cluster import ClusterState, Role
from moe_core.config.model import ModelConfig
from moe_core.exchange import link_spec
from moe_core.pb.epserve.v1 import attention_pb2, cluster_pb2, expert_pb2, gateway_pb2
from moe_core.pb.smg import common_pb2, vllm_engine_pb2
from moe_core.transport.base import Identity, TransportOptions
from moe_core.transport.handshake import make_hello
from support.mutations import Mutator
from support.processes import TINY_MODEL, Running, serving
from support.served_cluster import connected, greedy, method

NUM_MESSAGES = 100_000
WARM_UP = 10_000
IN_FLIGHT = 48
CALL_DEADLINE_S = 20.0
MAX_GROWTH = 50 * 2**20
# A pool of a few blocks: a message that asks for many tokens by chance cannot get more than that.
LAYOUT = ("--expert-devices", "2", "--ep-size", "2", "--kv-cache-tokens", "64")
GOOD = greedy([5, 6, 7], max_tokens=40)
ACCEPTABLE = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "FAILED_PRECONDITION",
    "RESOURCE_EXHAUSTED",
    "UNIMPLEMENTED",
}


@dataclass(frozen=True)
class Seed:
    """A valid message, the method that it is for and the process that serves it."""

    process: str
    called: MethodDescriptor
    message: bytes


def seed(process: str, proto: object, service: str, name: str, message: Message) -> Seed:
    return Seed(process, method(proto, service, name), message.SerializeToString())  # type: ignore[arg-type]


def gateway_seeds() -> list[Seed]:
    sampling = gateway_pb2.SamplingParams(
        max_tokens=1,
        temperature=0.5,
        top_p=0.75,
        top_k=4,
        min_p=0.125,
        seed=7,
        stop=["stop"],
        stop_token_ids=[9, 10],
        repetition_penalty=1.25,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logprobs=2,
        logit_bias={3: 1.5},
        min_tokens=1,
        n=1,
    )
    ids = gateway_pb2.TokenIds(ids=[5, 6, 7])
    by_name = {
        "Generate": gateway_pb2.GenerateRequest(
            request_id="a request", model="tiny_model", token_ids=ids, sampling=sampling, priority=1
        ),
        "Abort": gateway_pb2.AbortRequest(request_id="a request"),
        "ListModels": gateway_pb2.ListModelsRequest(),
        "GetCluster": gateway_pb2.GetClusterRequest(),
    }
    text = gateway_pb2.GenerateRequest(text="Once upon a time", sampling=sampling)
    seeds = [seed("gateway", gateway_pb2, "Gateway", *each) for each in by_name.items()]
    return [*seeds, seed("gateway", gateway_pb2, "Gateway", "Generate", text)]


def vllm_seeds() -> list[Seed]:
    pb = vllm_engine_pb2
    sampling = pb.SamplingParams(
        max_tokens=1,
        temperature=0.5,
        top_p=0.75,
        top_k=4,
        stop=["stop"],
        stop_token_ids=[9],
        logprobs=2,
        seed=7,
        logit_bias={3: 1.5},
        n=1,
    )
    tokenized = pb.TokenizedInput(original_text="Once", input_ids=[5, 6, 7])
    by_name: dict[str, Message] = {
        "Generate": pb.GenerateRequest(
            request_id="another", tokenized=tokenized, sampling_params=sampling, stream=True
        ),
        "Abort": pb.AbortRequest(request_ids=["another", "a request"]),
        "HealthCheck": pb.HealthCheckRequest(),
        "GetModelInfo": pb.GetModelInfoRequest(),
        "GetServerInfo": pb.GetServerInfoRequest(),
        "GetLoads": pb.GetLoadsRequest(dp_rank=0, include=["core"]),
        "Embed": pb.EmbedRequest(request_id="another", tokenized=tokenized),
        "FlushCache": common_pb2.FlushCacheRequest(timeout_s=1.0),
        "GetTokenizer": common_pb2.GetTokenizerRequest(),
    }
    return [seed("gateway", pb, "VllmEngine", *each) for each in by_name.items()]


def cluster_seeds(state: ClusterState) -> list[Seed]:
    """What workers send, as one that has joined already: nothing may be free for a second."""
    expert = state.tier(Role.EXPERT)[0]
    fingerprint = Checkpoint.open(TINY_MODEL).fingerprint()
    join = cluster_pb2.Join(
        role=cluster_pb2.ROLE_EXPERT,
        rank=0,
        address=expert.address,
        device="cpu",
        pid=expert.pid,
        model_fingerprint=fingerprint,
        instance_epoch=expert.instance_epoch + 1,
        dtype="float32",
        host_id=expert.host_id,
    )
    load = cluster_pb2.AttentionLoad(total_kv_blocks=4, free_kv_blocks=4, kv_block_size=16)
    status = cluster_pb2.StatusReport(
        state=cluster_pb2.MEMBER_STATE_READY, detail="well", attention_load=load
    )
    lease = cluster_pb2.LeaseRequest(
        role=cluster_pb2.ROLE_EXPERT, rank=0, instance_epoch=expert.instance_epoch + 1
    )
    service = (cluster_pb2, "ClusterService")
    return [
        seed("gateway", *service, "Register", cluster_pb2.RegisterRequest(join=join)),
        seed("gateway", *service, "Register", cluster_pb2.RegisterRequest(status=status)),
        seed("gateway", *service, "Lease", lease),
    ]


def tier_seeds(state: ClusterState) -> list[Seed]:
    """What the gateway sends attention processes, and those send experts."""
    sampling = attention_pb2.EngineSampling(max_tokens=1, top_p=1.0, temperature=0.5, seed=3)
    add = attention_pb2.AddSequence(sequence_id="a", prompt_ids=[5, 6], sampling=sampling)
    abort = attention_pb2.AbortSequence(sequence_id="a")
    spec = link_spec(
        ModelConfig.from_hf(TINY_MODEL),
        state.parallel,
        model_fingerprint=Checkpoint.open(TINY_MODEL).fingerprint(),
        dtype=torch.float32,
        spare_slots=TransportOptions().spare_slots,
    )
    hello = make_hello(spec, Identity(0, 1, 1), Identity(0, 2, 0), ("grpc",), None)
    serve = (attention_pb2, "AttentionService", "Serve")
    exchange = (expert_pb2, "ExpertService", "Exchange")
    return [
        seed("attn_0", *serve, attention_pb2.EngineRequest(add=add)),
        seed("attn_0", *serve, attention_pb2.EngineRequest(abort=abort)),
        seed("expert_0", *exchange, expert_pb2.ExchangeRequest(hello=hello)),
    ]


class Sender:
    """Sends encoded messages, many in flight on one channel a process, and counts the answers."""

    def __init__(self, addresses: dict[str, str]) -> None:
        self._channels = {
            name: grpc.aio.insecure_channel(address) for name, address in addresses.items()
        }
        self.statuses: collections.Counter[tuple[str, str]] = collections.Counter()
        self.examples: dict[tuple[str, str], tuple[bytes, str]] = {}

    async def send_all(self, messages: Iterator[Seed]) -> None:
        async def work() -> None:
            for each in messages:
                await self._send(each)

        await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    async def _send(self, each: Seed) -> None:
        called, channel = each.called, self._channels[each.process]
        path = f"/{called.containing_service.full_name}/{called.name}"
        status, details = "OK", ""
        try:
            if called.client_streaming:
                call = channel.stream_stream(path)(iter([each.message]), timeout=CALL_DEADLINE_S)
            elif called.server_streaming:
                call = channel.unary_stream(path)(each.message, timeout=CALL_DEADLINE_S)
            else:
                await channel.unary_unary(path)(each.message, timeout=CALL_DEADLINE_S)
            if called.server_streaming:
                async for _ in call:
                    pass
        except grpc.aio.AioRpcError as error:
            status, details = error.code().name, error.details() or ""
        self.statuses[path, status] += 1
        self.examples.setdefault((path, status), (each.message, details))


def memory(serve: Running) -> dict[int, int]:
    """Resident bytes by process id."""
    return {process.pid: process.memory_info().rss for process in serve.family()}


def mutated(seeds: list[Seed], mutator: Mutator) -> Iterator[Seed]:
    """Without end, each in its turn."""
    for each in itertools.cycle(seeds):
        message = mutator.mutate(each.message, each.called.input_type)
        yield Seed(each.process, each.called, message)


@pytest.mark.timeout(900)
def test_mutated_messages_harm_nobody() -> None:
    with serving(*LAYOUT) as (serve, target), connected(target) as cluster:
        wanted = cluster.generate(GOOD)
        state = cluster.state
        seeds = [*gateway_seeds(), *vllm_seeds(), *cluster_seeds(state), *tier_seeds(state)]
        messages = mutated(seeds, Mutator(seed=1))

        async def run() -> tuple[Sender, dict[int, int]]:
            sender = Sender(cluster.addresses)
            await sender.send_all(itertools.islice(messages, WARM_UP))
            warm = memory(serve)
            await sender.send_all(itertools.islice(messages, NUM_MESSAGES - WARM_UP))
            await sender.close()
            return sender, warm

        sender, warm = asyncio.run(run())
        unexpected = {
            key: (count, sender.examples[key])
            for key, count in sender.statuses.items()
            if key[1] not in ACCEPTABLE
        }
        assert unexpected == {}
        assert sum(sender.statuses.values()) == NUM_MESSAGES
        now = memory(serve)
        assert now.keys() == warm.keys()
        assert {pid: now[pid] - warm[pid] for pid in now if now[pid] - warm[pid] > MAX_GROWTH} == {}
        assert cluster.settled().is_idle
        assert cluster.generate(GOOD) == wanted
        print(dict(sender.statuses))
