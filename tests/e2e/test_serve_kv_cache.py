"""The KV cache of a served cluster: its size by memory, agreed on within a TP group."""

import json
import re

from support.processes import TINY_MODEL, epserve, serving, started

PROMPT = ",".join(str(token) for token in range(3, 43))
CACHED = 40 // 16 * 16  # of its 40 tokens, those in full blocks


def generate(target: str) -> tuple[list[int], int]:
    """The tokens, and how many of the prompt's were found in the cache."""
    done = epserve(
        *("generate", "--target", target, "--prompt-ids", PROMPT, "--json"),
        *("--max-tokens", "8", "--temperature", "0", "--ignore-eos"),
    )
    assert done.returncode == 0, done
    document = json.loads(done.stdout)
    return document["token_ids"], document["usage"]["cached_tokens"]


def test_ranks_of_a_group_agree_on_what_each_has_measured():
    with serving("--attn-devices", "2", "--memory-utilization", "0.002") as (serve, target):
        (first, none), (again, found) = generate(target), generate(target)
        lines = [line for line in serve.err + serve.out if "KV cache" in line]
    assert first == again
    assert (none, found) == (0, CACHED)
    sizes = [int(re.search(r"blocks[=\D]+(\d+)", line)[1]) for line in lines]
    assert len(sizes) == 2, lines
    assert sizes[0] == sizes[1] > 100


def test_ranks_with_different_sizes_are_refused_on_both_with_the_numbers():
    options = ("--model", str(TINY_MODEL), "--device", "cpu")
    ports = ("--grpc-port", "0", "--port", "0")
    with started("gateway", *options[:2], "--attn-devices", "2", *ports) as gateway:
        line = gateway.wait_for("listening")
        worker = (*options, "--gateway", re.search(r"127\.0\.0\.1:\d+", line)[0])
        with (
            started("attn", *worker, "--rank", "0", "--kv-cache-tokens", "1024") as leader,
            started("attn", *worker, "--rank", "1", "--kv-cache-memory", "1MiB") as follower,
        ):
            assert (leader.wait(60), follower.wait(60)) == (2, 2), f"{leader}\n{follower}"
    for process in (leader, follower):
        assert "KV blocks by tp rank=[64, " in process.err[-1]
