"""A served cluster as its user meets it: generate, status, errors."""

import json
import os
import signal
from collections.abc import Iterator

import pytest

from support.processes import epserve, serving, started

MEMBER_FIELDS = {
    *("role", "rank", "dp_rank", "tp_rank", "ep_rank", "etp_rank"),
    *("pid", "address", "device", "state", "experts"),
}
LINK_FIELDS = {
    *("source", "target", "transport"),
    *("dispatch_bytes", "combine_bytes", "dispatches"),
}


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    layout = ("--expert-devices", "2", "--ep-size", "2", "--num-redundant-experts", "2")
    with serving(*layout, "--kv-cache-tokens", "4096") as (_, address):
        yield address


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


def test_status_json_lists_members_and_links(target: str):
    generate_json(target, "--prompt-ids", "5,6,7", "--max-tokens", "4", "--ignore-eos")
    done = epserve("status", "--target", target, "--json")
    assert done.returncode == 0, done
    document = json.loads(done.stdout)
    assert set(document) == {"placement_epoch", "members", "links"}
    assert document["placement_epoch"] == 0
    assert all(set(member) == MEMBER_FIELDS for member in document["members"])
    named = {(m["role"], m["rank"]): m for m in document["members"]}
    assert set(named) == {("gateway", 0), ("attn", 0), ("expert", 0), ("expert", 1)}
    assert all(member["state"] == "ready" for member in named.values())
    assert named["expert", 1]["experts"] == 9
    assert (named["attn", 0]["dp_rank"], named["attn", 0]["ep_rank"]) == (0, None)
    assert all(set(link) == LINK_FIELDS for link in document["links"])
    assert len(document["links"]) == 2


def test_status_prints_tables(target: str):
    done = epserve("status", "--target", target)
    assert done.returncode == 0, done
    for words in ("gateway", "attn 0", "expert 1", "ready", "Level 1"):
        assert words in done.stdout
