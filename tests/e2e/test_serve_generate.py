"""A served cluster as its users meet it: what it prints, generates, tells of itself and frees."""

import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product

import grpc
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from attn_service.sequence import Sampling, SequenceRequest
from moe_core.cluster import LinkStats
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from support.local_engine import local_engine
from support.processes import TINY_MODEL, Running, epserve, serving, started
from support.served_cluster import DEADLINE_S, ServedCluster, connected, greedy, method

MEMBER_FIELDS = {
    *("role", "rank", "dp_rank", "tp_rank", "ep_rank", "etp_rank"),
    *("pid", "address", "device", "detail", "state", "experts", "metrics", "queued_requests"),
}
LINK_FIELDS = {
    *("source", "target", "transport"),
    *("dispatch_bytes", "combine_bytes", "dispatches"),
}


LAYOUT = (
    *("--attn-devices", "2", "--expert-devices", "2", "--ep-size", "2"),
    *("--num-redundant-experts", "2", "--kv-cache-tokens", "4096", "--dtype", "float64"),
)
PROCESSES = {
    "gateway": {
        "epserve.v1.Gateway",
        "epserve.v1.Admin",
        "epserve.v1.ClusterService",
        "vllm.grpc.engine.VllmEngine",
    },
    "attn_0": {"epserve.v1.AttentionService"},
    "attn_1": {"epserve.v1.AttentionService"},
    "expert_0": {"epserve.v1.ExpertService"},
    "expert_1": {"epserve.v1.ExpertService"},
}
LONG = greedy([5, 6, 7], max_tokens=1000)
DISPATCHES_PER_TOKEN = 3 * 2  # MoE layers, expert processes


@pytest.fixture(scope="module")
def serve() -> Iterator[tuple[Running, str]]:
    with serving(*LAYOUT) as started_and_target:
        yield started_and_target


@pytest.fixture(scope="module")
def target(serve: tuple[Running, str]) -> str:
    return serve[1]


@pytest.fixture(scope="module")
def served(target: str) -> Iterator[ServedCluster]:
    with connected(target) as cluster:
        yield cluster


def test_the_layout_is_printed_before_anything_is_loaded(serve: tuple[Running, str]):
    running, target = serve
    (http_port,) = re.findall(r"http://127\.0\.0\.1:(\d+) \(HTTP\)", "\n".join(running.out))
    first = next(i for i, line in enumerate(running.out) if line.startswith("waiting for"))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in running.out[:first]]
    assert [row for row in rows if row] == [
        ["gateway", "", "", "", "", "", "", f"{target.rpartition(':')[2]} / {http_port}"],
        ["attn 0", "0", "0", "", "", "", "cpu", "any"],
        ["attn 1", "0", "1", "", "", "", "cpu", "any"],
        ["expert 0", "", "", "0", "0", "8+1+0", "cpu", "any"],
        ["expert 1", "", "", "1", "0", "8+1+0", "cpu", "any"],
    ]


@pytest.mark.parametrize("process", PROCESSES)
def test_every_process_answers_health_and_reflection(served: ServedCluster, process: str):
    check = method(health_pb2, "Health", "Check")
    (answer,) = served.send(process, check, health_pb2.HealthCheckRequest().SerializeToString())
    response = health_pb2.HealthCheckResponse
    assert response.FromString(answer).status == response.SERVING
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    reflect = method(reflection_pb2, "ServerReflection", "ServerReflectionInfo")
    (answer,) = served.send(process, reflect, request.SerializeToString())
    listed = reflection_pb2.ServerReflectionResponse.FromString(answer).list_services_response
    assert {service.name for service in listed.service} == PROCESSES[process] | {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_two_tiers_give_the_tokens_of_one_process_and_write_them_by_nixl(
    served: ServedCluster,
):
    """Attention with tp 2, experts on two processes with copies: five processes in all. NIXL is
    what they take by themselves, and the bytes are Level 1's: every row to every process, once."""
    request = SequenceRequest("a", (5, 6, 7), Sampling(max_tokens=120))
    async with local_engine(TINY_MODEL, ParallelConfig(), dtype=torch.float64) as local:
        alone = (await local.generate([request]))["a"].token_ids
    before = served.settled().links
    assert served.generate(greedy([5, 6, 7], max_tokens=120)) == list(alone)
    links = served.settled().links
    assert [(link.transport, link.stream_tensor_bytes) for link in links] == [("nixl", 0)] * 4
    assert all(link.dispatches >= 120 for link in links if link.source == "attn 0")
    model = ModelConfig.from_hf(TINY_MODEL)
    rows = (3 + 119) * len(model.moe_layer_ids)  # the last token is not computed
    counted = bytes_by_expert(links) - bytes_by_expert(before)
    assert counted == dict.fromkeys(
        product(("expert 0", "expert 1"), ("there", "back")), rows * model.hidden_size * 8
    )


def bytes_by_expert(links: Sequence[LinkStats]) -> Counter[tuple[str, str]]:
    """From and to both ranks of the attention group."""
    counted: Counter[tuple[str, str]] = Counter()
    for link in links:
        counted[link.target, "there"] += link.dispatch_bytes
        counted[link.target, "back"] += link.combine_bytes
    return counted


def generate_json(target: str, *arguments: str) -> dict[str, object]:
    (document,) = generate_choices(target, *arguments)
    return document


def generate_choices(target: str, *arguments: str) -> list[dict[str, object]]:
    done = epserve("generate", "--target", target, "--json", *arguments)
    assert done.returncode == 0, done
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_generate_prints_the_text(target: str):
    done = epserve(
        *("generate", "--target", target, "--prompt", "Return a list of"),
        *("--max-tokens", "12", "--temperature", "0", "--ignore-eos"),
    )
    assert done.returncode == 0, done
    document = generate_json(
        target,
        *("--prompt", "Return a list of"),
        *("--max-tokens", "12", "--temperature", "0", "--ignore-eos"),
    )
    assert done.stdout == f"{document['text']}\n"
    assert len(done.stdout) > 10


def test_generate_json_is_one_object_per_choice(target: str):
    document = generate_json(
        target, "--prompt-ids", "5,6,7", "--max-tokens", "8", "--ignore-eos", "--seed", "3"
    )
    assert set(document) == {
        *("request_id", "index", "token_ids", "text", "finish_reason", "usage"),
    }
    assert document["index"] == 0
    assert len(document["token_ids"]) == 8
    assert document["finish_reason"] == "length"
    assert document["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "cached_tokens": 0}


def test_n_choices_with_logprobs_are_one_object_each(target: str):
    arguments = ("--prompt", "Return a list of", "--n", "3", "--logprobs", "2", "--seed", "4")
    documents = generate_choices(target, *arguments, "--max-tokens", "6", "--ignore-eos")
    assert sorted(document["index"] for document in documents) == [0, 1, 2]
    assert len({document["request_id"] for document in documents}) == 1
    assert len({tuple(document["token_ids"]) for document in documents}) == 3
    for document in documents:
        assert [told["token_id"] for told in document["logprobs"]] == document["token_ids"]
        for told in document["logprobs"]:
            assert told["logprob"] <= told["top"][0]["logprob"] <= 0
            assert len(told["top"]) == 2
            assert told["rank"] > 1 or told["logprob"] == told["top"][0]["logprob"]


def test_a_prompt_is_scored_by_what_its_tokens_would_have_been_told_as_outputs(target: str):
    greedy = ("--temperature", "0", "--ignore-eos", "--logprobs", "1", "--max-tokens", "6")
    out = generate_json(target, "--prompt-ids", "5,6,7", *greedy)
    ids = ",".join(map(str, [5, 6, 7, *out["token_ids"]]))
    scored = generate_json(
        target, "--prompt-ids", ids, "--prompt-logprobs", "1", "--max-tokens", "0"
    )
    assert (scored["token_ids"], scored["text"], scored["finish_reason"]) == ([], "", "length")
    told = scored["prompt_logprobs"]
    assert [each["token_id"] for each in told[2:]] == out["token_ids"]
    for each, before in zip(told[2:], out["logprobs"], strict=True):
        assert abs(each["logprob"] - before["logprob"]) < 0.05  # bfloat16, in another batch shape


def test_choices_in_text_stand_below_their_index(target: str):
    done = epserve(
        *("generate", "--target", target, "--prompt", "Return a list of", "--n", "2"),
        *("--max-tokens", "6", "--ignore-eos"),
    )
    assert done.returncode == 0, done
    assert {"[0]", "[1]"} <= set(done.stdout.splitlines())


def test_sampling_fields_reach_the_engine_or_are_refused(target: str):
    arguments = ("--prompt-ids", "5,6,7", "--max-tokens", "6", "--temperature", "0")
    biased = generate_json(target, *arguments, "--logit-bias", "9=100")
    assert biased["token_ids"] == [9] * 6
    refused = epserve("generate", "--target", target, *arguments, "--frequency-penalty", "3")
    assert refused.returncode == 2
    assert "frequency_penalty=3" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_the_same_seed_gives_the_same_tokens(target: str):
    arguments = ("--prompt", "The", "--max-tokens", "16", "--seed", "11", "--ignore-eos")
    first, second = (generate_json(target, *arguments) for _ in range(2))
    assert first["token_ids"] == second["token_ids"]


def test_ctrl_c_cancels_a_generation(target: str):
    with started(
        *("generate", "--target", target, "--prompt-ids", "5,6,7"),
        *("--max-tokens", "1000", "--ignore-eos"),
    ) as generating:
        os.kill(generating.pid, signal.SIGINT)
        assert generating.wait() != 0
    assert not any("Traceback" in line for line in generating.err)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_whoever_gives_up_frees_the_sequence_and_its_blocks(served: ServedCluster, how: str):
    before = served.settled().dispatches
    call = served.stub.Generate(LONG, timeout=DEADLINE_S if how == "cancel" else 1.5)
    next(call)
    if how == "cancel":
        call.cancel()
    with pytest.raises(grpc.RpcError) as ended:
        list(call)
    codes = {"cancel": grpc.StatusCode.CANCELLED, "deadline": grpc.StatusCode.DEADLINE_EXCEEDED}
    assert ended.value.code() is codes[how]
    after = served.settled()
    assert after.is_idle
    to_its_end = LONG.sampling.max_tokens * DISPATCHES_PER_TOKEN
    assert 0 < after.dispatches - before < to_its_end, "it went on for nobody"


def test_status_json_lists_members_and_links(target: str):
    generate_json(target, "--prompt-ids", "5,6,7", "--max-tokens", "4", "--ignore-eos")
    document = status_json(target)
    assert set(document) == {"placement_epoch", "sizes", "target", "members", "links"}
    assert document["placement_epoch"] == 0
    assert all(set(member) == MEMBER_FIELDS for member in document["members"])
    named = {(m["role"], m["rank"]): m for m in document["members"]}
    assert set(named) == {("gateway", 0), *product(("attn", "expert"), (0, 1))}
    assert all(member["state"] == "ready" for member in named.values())
    assert named["expert", 1]["experts"] == 9
    assert (named["attn", 1]["tp_rank"], named["attn", 1]["ep_rank"]) == (1, None)
    assert all(set(link) == LINK_FIELDS for link in document["links"])
    assert len(document["links"]) == 4


def status_json(target: str) -> dict:
    done = epserve("status", "--target", target, "--json")
    assert done.returncode == 0, done
    return json.loads(done.stdout)


def metrics_by_member(target: str) -> dict[tuple[str, int], dict[str, float] | None]:
    members = status_json(target)["members"]
    return {(member["role"], member["rank"]): member["metrics"] for member in members}


def test_status_json_says_what_the_leader_of_an_attention_group_counts(target: str):
    before = metrics_by_member(target)["attn", 0]
    assert before is not None
    generate_json(target, "--prompt-ids", "5,6,7", "--max-tokens", "4", "--ignore-eos")
    deadline = time.monotonic() + DEADLINE_S  # it reports twice a second
    while (metrics := metrics_by_member(target))["attn", 0]["steps"] < before["steps"] + 4:
        assert time.monotonic() < deadline
    assert {who for who, counted in metrics.items() if counted is not None} == {("attn", 0)}
    after = metrics["attn", 0]
    assert (after["num_running"], after["total_kv_blocks"]) == (0, 256)
    parts = ("attention_s", "dispatch_s", "expert_wait_s", "combine_s", "sampling_s", "other_s")
    assert all(after[part] > before[part] for part in parts)
    assert sum(after[part] for part in parts) == pytest.approx(after["step_s"])
    assert after["expert_compute_s"] > before["expert_compute_s"]


def test_status_prints_tables(target: str):
    done = epserve("status", "--target", target)
    assert done.returncode == 0, done
    for words in ("gateway", "attn 0", "expert 1", "ready", "Level 1"):
        assert words in done.stdout


def test_nothing_listens_beyond_this_machine(serve: tuple[Running, str], target: str):
    """Neither our servers nor what UCX, gloo and torch's store open beside them."""
    listening = {
        (process.pid, each.laddr.ip.removeprefix("::ffff:"))
        for process in serve[0].family()
        for each in process.net_connections(kind="tcp")
        if each.status == psutil.CONN_LISTEN
    }
    assert len({pid for pid, _ in listening}) == len(PROCESSES)
    assert {address for _, address in listening} <= {"127.0.0.1", "::1"}
