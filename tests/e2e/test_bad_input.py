"""Bad input, case by case, to one running cluster: what answers it, and that nobody is harmed.

After every case a request that needs every block of the KV pool must give the tokens that it gave
before the first: it would wait for ever for a block that was lost.
"""

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import grpc
import pytest
import torch
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.cluster import MemberState
from moe_core.config.model import ModelConfig
from moe_core.exchange import link_spec
from moe_core.pb.epserve.v1 import attention_pb2, cluster_pb2, expert_pb2
from moe_core.pb.epserve.v1 import gateway_pb2 as pb
from moe_core.transport.base import Identity, TransportOptions
from moe_core.transport.handshake import make_hello
from support.processes import TINY_MODEL, epserve, serving
from support.served_cluster import (
    DEADLINE_S,
    ServedCluster,
    connected,
    greedy,
    method,
    methods,
    refused,
)
from support.wrong_models import make_wrong_models

KV_TOKENS = 128
LAYOUT = (
    *("--attn-devices", "2", "--expert-devices", "2", "--ep-size", "2"),
    *("--dtype", "float64", "--kv-cache-tokens", str(KV_TOKENS)),
)
FEW_TOKENS = greedy([5, 6, 7], max_tokens=40)
WHOLE_POOL = greedy(range(100, 225), max_tokens=KV_TOKENS + 1 - 125)
NAN, INF = math.nan, math.inf
INVALID = grpc.StatusCode.INVALID_ARGUMENT
GARBAGE = b"\xff\xff\xff not protobuf"


@dataclass(frozen=True)
class Cluster:
    """`tokens` are WHOLE_POOL's; `names` are what stands in braces in the cases below."""

    served: ServedCluster
    tokens: list[int]
    names: dict[str, str]

    @property
    def processes(self) -> dict[int, MemberState]:
        return {member.pid: member.state for member in self.served.state.members}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    names = make_wrong_models(TINY_MODEL, tmp_path_factory.mktemp("models"))
    with serving(*LAYOUT) as (_, target), connected(target) as served:
        names |= {"tiny": str(TINY_MODEL), "target": target}
        for model in ("tiny", "retrained"):
            names[f"{model}_fingerprint"] = Checkpoint.open(Path(names[model])).fingerprint()
        names |= {f"{name}_port": at.rpartition(":")[2] for name, at in served.addresses.items()}
        yield Cluster(served, served.generate(WHOLE_POOL), names)
        assert served.settled().is_idle


@pytest.fixture
def cluster(running: Cluster) -> Iterator[Cluster]:
    processes = running.processes
    yield running
    assert running.served.generate(WHOLE_POOL) == running.tokens
    assert running.processes == processes


def prompt(*token_ids: int, **sampling: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=token_ids), sampling=pb.SamplingParams(**sampling)
    )


# By case: what is asked of the gateway, the status that answers, what the message must name.
REQUESTS = {
    "prompt longer than the model": (
        *(prompt(*[5] * 1024), INVALID),
        ("prompt: 1024 tokens", "max_position_embeddings=1024"),
    ),
    "prompt longer than the KV pool": (
        *(prompt(*[5] * 129), INVALID),
        ("prompt: 129 tokens", "KV pool, of 128 tokens"),
    ),
    "text longer than the model": (
        *(pb.GenerateRequest(text="word " * 4_000_000), INVALID),
        ("text: has 20000000 characters", "at most 1024 tokens (max_position_embeddings)"),
    ),
    "request longer than a message may be": (
        *(pb.GenerateRequest(text="word " * 14_000_000), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("larger than max", "67108864"),
    ),
    "token id beyond the vocabulary": (prompt(5, 2048), INVALID, ("token id 2048", "2047")),
    "largest token id": (prompt(5, 2**32 - 1), INVALID, ("token id 4294967295", "2047")),
    "no prompt": (pb.GenerateRequest(), INVALID, ("prompt: must have at least one token",)),
    "prompt without tokens": (prompt(), INVALID, ("prompt: must have at least one token",)),
    "empty text": (pb.GenerateRequest(text=""), INVALID, ("prompt: must have at least one",)),
    "unknown model": (
        *(pb.GenerateRequest(model="other", text="Once"), grpc.StatusCode.NOT_FOUND),
        ("model='other'", "'tiny_model'"),
    ),
    **{
        f"{field} {value}": (prompt(5, **{field: value}), INVALID, (f"{field}={value:g}",))
        for field, values in {
            "temperature": (-1.0, NAN, INF),
            "top_p": (-0.5, NAN, INF),
            "top_k": (-1,),
            "min_p": (-0.5, NAN, INF),
            "repetition_penalty": (-1.0, NAN, INF),
            "presence_penalty": (-9.0, NAN, INF),
            "frequency_penalty": (-9.0, NAN, INF),
        }.items()
        for value in values
    },
    "logit_bias nan": (prompt(5, logit_bias={7: NAN}), INVALID, ("logit_bias[7]=nan",)),
    "logit_bias inf": (prompt(5, logit_bias={7: INF}), INVALID, ("logit_bias[7]=inf",)),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_a_request_that_cannot_be_served(cluster: Cluster, case: str) -> None:
    request, code, named = REQUESTS[case]
    with refused(code, *named):
        cluster.served.generate(request)


SERVED = {
    "gateway": (pb, cluster_pb2),
    "attn_0": (attention_pb2,),
    "expert_0": (expert_pb2,),
}
METHODS = [
    pytest.param(process, called, id=f"{process}-{called.full_name}")
    for process, own in SERVED.items()
    for proto in (*own, health_pb2, reflection_pb2)
    for called in methods(proto)
]


@pytest.mark.parametrize(("process", "called"), METHODS)
def test_garbage_instead_of_a_message(
    cluster: Cluster, process: str, called: MethodDescriptor
) -> None:
    with refused(INVALID, called.input_type.full_name):
        cluster.served.send(process, called, GARBAGE)


def test_a_stream_that_is_under_way_meanwhile(cluster: Cluster) -> None:
    wanted = cluster.served.generate(FEW_TOKENS)
    answers = cluster.served.stub.Generate(FEW_TOKENS, timeout=DEADLINE_S)
    tokens = list(next(answers).token_ids)
    for request, code, _ in REQUESTS.values():
        with refused(code):
            cluster.served.generate(request)
    tokens += [token for answer in answers for token in answer.token_ids]
    assert tokens == wanted


def test_garbage_behind_a_sequence_that_runs(cluster: Cluster) -> None:
    sampling = attention_pb2.EngineSampling(max_tokens=100, top_p=1.0)
    add = attention_pb2.AddSequence(sequence_id="a", prompt_ids=[5], sampling=sampling)
    message = attention_pb2.EngineRequest(add=add).SerializeToString()
    serve = method(attention_pb2, "AttentionService", "Serve")
    with refused(INVALID, "epserve.v1.EngineRequest"):
        cluster.served.send("attn_0", serve, message, GARBAGE)


def test_hello_from_a_different_checkpoint(cluster: Cluster) -> None:
    ours, theirs = (cluster.names[f"{model}_fingerprint"] for model in ("tiny", "retrained"))
    spec = link_spec(
        ModelConfig.from_hf(TINY_MODEL),
        cluster.served.state.parallel,
        model_fingerprint=theirs,
        dtype=torch.float64,
        spare_slots=TransportOptions().spare_slots,
    )
    hello = make_hello(spec, Identity(0, 2, 1), Identity(0, 2, 0), ("grpc",), None)
    message = expert_pb2.ExchangeRequest(hello=hello).SerializeToString()
    exchange = method(expert_pb2, "ExpertService", "Exchange")
    named = f"model_fingerprint is {theirs!r} on the attention side, {ours!r} on the expert side"
    with refused(grpc.StatusCode.FAILED_PRECONDITION, named):
        cluster.served.send("expert_0", exchange, message)


# What is typed, its exit status, what its one line on stderr must name.
Command: TypeAlias = tuple[str, int, tuple[str, ...]]
COMMANDS: list[Command] = [
    ("generate --target {target} --prompt-ids 5,2048", 2, ("token id 2048", "2047")),
    ("generate --target {target} --prompt ''", 2, ("prompt: must have at least one token",)),
    ("generate --target {target} --prompt \udcff", 2, ("text: is not valid Unicode",)),
    ("generate --target {target} --prompt-ids 4294967296", 2, ("token_ids", "4294967296")),
    ("generate --target {target} --prompt-ids 5 --temperature nan", 2, ("temperature=nan",)),
    ("generate --target {target} --prompt-ids 5 --max-tokens -5", 2, ("max_tokens=-5",)),
    ("serve --model {missing}", 2, ("model='{missing}'", "must be an existing directory")),
    ("serve --model {empty}", 2, ("model='{empty}'", "must hold a config.json")),
    ("serve --model {without_weights}", 2, ("'{without_weights}'", "must hold model.safetensors")),
    ("serve --model {unknown_family}", 2, ("model_type='llama'", "deepseek_v3")),
    ("serve --model {cut_short}", 1, ("{cut_short}/model.safetensors", "truncated")),
    ("serve --model {tiny} --grpc-port {gateway_port}", 2, ("{target}", "in use")),
    (
        "serve --model {tiny} --grpc-port 0 --port 0 --device cuda",
        2,
        ("device='cuda'", "valid: cpu"),
    ),
    ("gateway --model {missing}", 2, ("model='{missing}'", "must be an existing directory")),
    ("gateway --model {tiny} --grpc-port {gateway_port}", 2, ("{target}", "in use")),
    ("serve --model {tiny} --grpc-port 0 --port {gateway_port}", 2, ("{target}", "in use")),
    ("gateway --model {tiny} --grpc-port 0 --port {gateway_port}", 2, ("{target}", "in use")),
    ("attn --model {tiny} --port {attn_0_port}", 2, ("127.0.0.1:{attn_0_port}", "in use")),
    (
        *("expert --model {retrained} --gateway {target}", 2),
        ("{tiny_fingerprint}", "{retrained_fingerprint}", "the same --model"),
    ),
    ("expert --model {tiny} --gateway {target}", 2, ("dtype=bfloat16", "--dtype float64")),
    ("expert --model {tiny} --device cuda:99", 2, ("device='cuda:99'", "valid: auto, cpu")),
]


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: case[0])
def test_a_command_that_is_refused(cluster: Cluster, case: Command) -> None:
    typed, status, named = case
    if typed.endswith("--device cuda") and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    done = epserve(*shlex.split(typed.format(**cluster.names)))
    assert (done.returncode, done.stdout) == (status, ""), done
    (line,) = done.stderr.splitlines()
    for words in named:
        assert words.format(**cluster.names) in line
