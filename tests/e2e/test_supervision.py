"""`epserve serve` with a process killed: it is started again, and the cluster serves as before."""

import json
import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest

from support.processes import Running, epserve, serving, still_alive

LAYOUT = (
    *("--attn-devices", "2", "--expert-devices", "2", "--ep-size", "2"),
    *("--dtype", "float64", "--kv-cache-tokens", "1024"),
)
SERVES_AGAIN_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Running, str]]:
    with serving(*LAYOUT) as (serve, target):
        yield serve, target


def child(serve: Running, name: str) -> psutil.Process | None:
    """The process that has this name now."""
    role, _, rank = name.partition(" ")
    for process in psutil.Process(serve.pid).children():
        try:
            words = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if role in words and (not rank or words[words.index("--rank") + 1] == rank):
            return process
    return None


def kill(serve: Running, name: str) -> int:
    """Kill it as soon as it is there; its process id."""
    deadline = time.monotonic() + SERVES_AGAIN_S
    while (process := child(serve, name)) is None:
        assert time.monotonic() < deadline, f"no {name} in:\n{serve}"
        time.sleep(0.02)
    process.kill()
    process.wait(10)
    return process.pid


def answer(target: str) -> list[int] | None:
    done = epserve(
        *("generate", "--target", target, "--prompt-ids", "5,6,7"),
        *("--max-tokens", "8", "--ignore-eos", "--temperature", "0", "--json"),
    )
    return json.loads(done.stdout)["token_ids"] if done.returncode == 0 else None


def answer_again(target: str) -> list[int]:
    deadline = time.monotonic() + SERVES_AGAIN_S
    while (tokens := answer(target)) is None:
        assert time.monotonic() < deadline, "it does not serve again"
    return tokens


def members(target: str) -> dict[tuple[str, int], int]:
    """Process ids by role and rank, once all are ready."""
    deadline = time.monotonic() + SERVES_AGAIN_S
    while True:
        done = epserve("status", "--target", target, "--json")
        found = json.loads(done.stdout)["members"] if done.returncode == 0 else []
        if len(found) == 5 and all(member["state"] == "ready" for member in found):
            return {(member["role"], member["rank"]): member["pid"] for member in found}
        assert time.monotonic() < deadline, found


@pytest.mark.parametrize(
    ("victim", "replaced"),
    [
        ("gateway", {("gateway", 0)}),
        ("expert 1", {("expert", 1)}),
        ("attn 1", {("attn", 0), ("attn", 1)}),  # one TP group: it ends as a whole
    ],
)
def test_a_killed_process_is_started_again_and_the_cluster_serves_as_before(
    cluster: tuple[Running, str], victim: str, replaced: set[tuple[str, int]]
) -> None:
    serve, target = cluster
    before, tokens = members(target), answer(target)
    assert tokens is not None
    pid = kill(serve, victim)
    line = serve.wait_for(f"starting {victim} again in 0.5 s: ")
    assert f"{victim} (pid {pid}) was ended by signal 9 (SIGKILL)" in line
    assert answer_again(target) == tokens
    after = members(target)
    assert {who for who in before if before[who] != after[who]} == replaced


def test_a_process_that_dies_again_and_again_ends_the_cluster_and_is_named() -> None:
    with serving("--kv-cache-tokens", "512") as (serve, _):
        for _ in range(4):
            kill(serve, "expert 0")
            serve.wait_for("starting expert 0 again in ")
        family = serve.family()
        pid = kill(serve, "expert 0")
        assert serve.wait() == 1
        assert serve.err[-1].startswith(f"epserve: expert 0 (pid {pid}) was ended by signal 9")
        assert "it has ended 5 times within 60 s" in serve.err[-1]
        assert still_alive(family) == []


def test_a_stop_while_a_start_is_awaited_leaves_nothing_behind() -> None:
    with serving("--kv-cache-tokens", "512", "--drain-timeout", "5") as (serve, _):
        for _ in range(2):
            kill(serve, "expert 0")
            serve.wait_for("starting expert 0 again in ")
        family = serve.family()
        os.kill(serve.pid, signal.SIGTERM)
        serve.wait_for("running requests get 5 s to end")
        assert serve.wait() == 0, serve
        assert still_alive(family) == []
        assert serve.out[-1] == "stopped"
