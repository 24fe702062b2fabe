"""Valid messages of all services, as clients and peers send them to a cluster of the tiny model."""

from dataclasses import dataclass, replace
from types import ModuleType

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
from moe_core.transport.handover import HandoverSpec, UnitKind
from moe_core.transport.handshake import make_hello
from support.processes import TINY_MODEL
from support.served_cluster import method


@dataclass(frozen=True)
class Addressed:
    """A valid message, the method that it is for and the process that serves it."""

    process: str
    called: MethodDescriptor
    message: bytes


def _addressed(
    process: str, proto: ModuleType, service: str, name: str, message: Message
) -> Addressed:
    return Addressed(process, method(proto, service, name), message.SerializeToString())


def valid_messages(state: ClusterState) -> list[Addressed]:
    """For a cluster of one attention and one expert process, not in float32. Those of a new worker
    speak for one in float32, so that none takes a process's place by chance."""
    return [
        *_gateway_messages(),
        *_vllm_messages(),
        *_cluster_messages(state),
        *_tier_messages(state),
    ]


def _gateway_messages() -> list[Addressed]:
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
        prompt_logprobs=1,
    )
    ids = gateway_pb2.TokenIds(ids=[5, 6, 7])
    by_name = {
        "Generate": gateway_pb2.GenerateRequest(
            request_id="a request", model="tiny_model", token_ids=ids, sampling=sampling, priority=1
        ),
        "Abort": gateway_pb2.AbortRequest(request_id="a request"),
        "ListModels": gateway_pb2.ListModelsRequest(),
        "GetCluster": gateway_pb2.GetClusterRequest(),
        "WatchCluster": gateway_pb2.WatchClusterRequest(),
    }
    text = gateway_pb2.GenerateRequest(text="Once upon a time", sampling=sampling)
    messages = [_addressed("gateway", gateway_pb2, "Gateway", *each) for each in by_name.items()]
    return [*messages, _addressed("gateway", gateway_pb2, "Gateway", "Generate", text)]


def _vllm_messages() -> list[Addressed]:
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
    return [_addressed("gateway", pb, "VllmEngine", *each) for each in by_name.items()]


def _cluster_messages(state: ClusterState) -> list[Addressed]:
    """What workers send."""
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
    follow = cluster_pb2.FollowLeaderRequest(address="h:1")
    service = (cluster_pb2, "ClusterService")
    return [
        _addressed("gateway", *service, "Register", cluster_pb2.RegisterRequest(join=join)),
        _addressed("gateway", *service, "Register", cluster_pb2.RegisterRequest(status=status)),
        _addressed("gateway", *service, "Lease", lease),
        _addressed("gateway", *service, "FollowLeader", follow),
    ]


def _tier_messages(state: ClusterState) -> list[Addressed]:
    """What the gateway sends attention processes, and those send experts."""
    sampling = attention_pb2.EngineSampling(max_tokens=1, top_p=1.0, temperature=0.5, seed=3)
    add = attention_pb2.AddSequence(sequence_id="a", prompt_ids=[5, 6], sampling=sampling)
    abort = attention_pb2.AbortSequence(sequence_id="a")
    park = attention_pb2.ParkSequence(sequence_id="a")
    find = attention_pb2.FindRequest(sequence_ids=["a", "b"])
    spec = link_spec(
        ModelConfig.from_hf(TINY_MODEL),
        state.parallel,
        model_fingerprint=Checkpoint.open(TINY_MODEL).fingerprint(),
        dtype=torch.float32,
        spare_slots=TransportOptions().spare_slots,
    )
    hello = make_hello(spec, Identity(0, 1, 1), Identity(0, 1, 0), ("grpc",), None)
    whole = HandoverSpec(spec.model_fingerprint, "float32", 0, 1, 64)
    handover_request = expert_pb2.HandoverRequest(hello=whole.hello(0, ("grpc",)))
    blocks = replace(whole, kind=UnitKind.KV_BLOCKS, layout="as nobody has it")
    blocks_request = expert_pb2.HandoverRequest(hello=blocks.hello(0, ("grpc",)))
    fetch = attention_pb2.FetchBlocksRequest(
        instance_epoch=1, block_ids=[1], own_blocks=[2], timeout_ms=10, leader_instance_epoch=1
    )
    locate = expert_pb2.LocateRequest(instance_epoch=1, tag=expert_pb2.Tag(slot=1, sequence=2))
    serve = (attention_pb2, "AttentionService", "Serve")
    exchange = (expert_pb2, "ExpertService", "Exchange")
    return [
        _addressed("attn_0", *serve, attention_pb2.EngineRequest(add=add)),
        _addressed("attn_0", *serve, attention_pb2.EngineRequest(abort=abort)),
        _addressed("attn_0", *serve, attention_pb2.EngineRequest(park=park)),
        _addressed("attn_0", *serve[:2], "Find", find),
        _addressed("attn_0", *serve[:2], "Handover", blocks_request),
        _addressed("attn_0", *serve[:2], "FetchBlocks", fetch),
        _addressed("expert_0", *exchange, expert_pb2.ExchangeRequest(hello=hello)),
        _addressed("expert_0", *exchange[:2], "Locate", locate),
        _addressed("expert_0", *exchange[:2], "Handover", handover_request),
    ]
