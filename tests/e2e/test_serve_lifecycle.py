"""`epserve serve` from start to stop, and what is left behind: nothing."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from moe_core.service.addresses import bound_socket
from support.processes import TINY_MODEL, epserve, serving, started, still_alive
from support.wrong_models import EXPERT, make_wrong_models

SMALL = ("--expert-devices", "2", "--ep-size", "2", "--kv-cache-tokens", "1024")
LONG = ("--prompt-ids", "5,6,7", "--max-tokens", "900", "--ignore-eos")
CUT_SHORT = "the drain was cut short"


def test_ctrl_c_stops_every_process_and_frees_the_port():
    with serving(*SMALL) as (serve, target):
        family = serve.family()
        assert len(family) == 5
        serve.send(signal.SIGINT)
        assert serve.wait() == 0, serve
        assert still_alive(family) == []
        assert serve.out[-1] == "stopped"
        assert not any("Traceback" in line for line in serve.err)
    bound_socket("127.0.0.1", int(target.rpartition(":")[2])).close()


def test_requests_that_outlast_the_drain_are_told_after_one_drain_timeout():
    with serving(*SMALL, "--drain-timeout", "0.2") as (serve, target):
        with started("generate", "--target", target, *LONG) as request:
            _wait_until_running(target)
            family = serve.family()
            serve.send(signal.SIGTERM)
            assert serve.wait() == 0, serve
            assert request.wait() == 1, request
        assert still_alive(family) == []
    assert "this gateway is shutting down, and the request had not" in request.err[-1]
    said = [*serve.out, *serve.err]
    assert len([line for line in said if CUT_SHORT in line]) == 1
    assert not _thrown(said)


def test_an_attention_process_whose_drain_is_cut_short_ends_in_order():
    with serving(*SMALL, "--drain-timeout", "0.2") as (serve, target):
        with started("generate", "--target", target, *LONG):
            _wait_until_running(target)
            (attention,) = [m for m in _status(target)["members"] if m["role"] == "attn"]
            os.kill(int(attention["pid"]), signal.SIGTERM)
            serve.wait_for("epserve attn: the drain did not end in order within 0.2 s")
        serve.wait_for("joined")  # its successor
        serve.send(signal.SIGTERM)
        assert serve.wait() == 0, serve
    assert not _thrown([*serve.out, *serve.err])


def test_a_second_ctrl_c_does_not_wait_for_running_requests():
    with serving(*SMALL) as (serve, target):
        with started("generate", "--target", target, *LONG):
            _wait_until_running(target)
            family = serve.family()
            serve.send(signal.SIGINT)
            serve.wait_for("Ctrl-C again stops at once")
            serve.send(signal.SIGINT)
            assert still_alive(family, timeout_s=5) == []
        assert serve.wait() == 0


def test_a_killed_serve_leaves_no_orphan():
    with serving(*SMALL) as (serve, _):
        family = serve.family()
        os.kill(serve.pid, signal.SIGKILL)
        assert still_alive(family) == []


def test_a_worker_that_cannot_start_is_named_with_what_it_said():
    with started(
        *("serve", "--model", str(TINY_MODEL), "--grpc-port", "0", "--port", "0"),
        *("--device", "cpu", "--kv-cache-tokens", "1"),
    ) as serve:
        serve.wait_for("waiting for")
        family = serve.family()
        status = serve.wait()
        assert still_alive(family) == []
    last = serve.err[-1]
    assert last.startswith("epserve: attn 0 (pid "), serve
    assert "kv_cache_tokens" in last
    assert status == 2


@pytest.mark.parametrize(
    ("model", "words"),
    [("not_finite", "holds NaN"), ("bit_flipped", "does not match epserve.manifest.json")],
)
def test_weights_that_are_found_wrong_while_loading_stop_the_start(
    tmp_path: Path, model: str, words: str
):
    directory = make_wrong_models(TINY_MODEL, tmp_path)[model]
    base = ("serve", "--model", directory, "--grpc-port", "0", "--port", "0", "--device", "cpu")
    with started(*base, *SMALL) as serve:
        serve.wait_for("waiting for")
        family = serve.family()
        assert serve.wait(60) == 1, serve
        assert still_alive(family) == []
    last = serve.err[-1]
    assert last.startswith("epserve: expert 0 (pid "), serve
    assert f"tensor {EXPERT}: " in last
    assert words in last


def test_sigterm_while_loading_stops_every_process():
    ports = ("--grpc-port", "0", "--port", "0")
    with started("serve", "--model", str(TINY_MODEL), *ports, *SMALL) as serve:
        serve.wait_for("waiting for")
        family = serve.family()
        serve.send(signal.SIGTERM)
        assert serve.wait() == 0, serve
        assert still_alive(family) == []


def _thrown(lines: list[str]) -> list[str]:
    return [line for line in lines if "Traceback" in line or "Exception ignored" in line]


def _status(target: str) -> dict[str, list[dict[str, object]]]:
    return json.loads(epserve("status", "--target", target, "--json").stdout)


def _wait_until_running(target: str) -> None:
    deadline = time.monotonic() + 30
    while not any(link["dispatches"] for link in _status(target)["links"]):
        assert time.monotonic() < deadline, "no dispatch was counted"
