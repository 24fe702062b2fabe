"""The processes of a cluster find each other in whatever order they are started."""

import socket
from contextlib import ExitStack

from support.processes import TINY_MODEL, epserve, started

MODEL = ("--model", str(TINY_MODEL))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_experts_first_and_the_gateway_last():
    port = free_port()
    target = f"127.0.0.1:{port}"
    worker = (*MODEL, "--gateway", target, "--device", "cpu")
    with ExitStack() as stack:
        experts = [stack.enter_context(started("expert", *worker)) for _ in range(2)]
        attn = stack.enter_context(started("attn", *worker, "--kv-cache-tokens", "1024"))
        for process in (*experts, attn):
            process.wait_for("waiting for the gateway")
        gateway = stack.enter_context(
            started(
                *("gateway", *MODEL, "--grpc-port", str(port), "--port", "0"),
                *("--expert-devices", "2", "--ep-size", "2"),
            )
        )
        gateway.wait_for("event='ready'")
        for process in experts:  # whose stderr is no terminal
            process.wait_for("loading experts: 3 of 3 layers in")
        attn.wait_for("loading: 4 of 4 layers in")
        done = epserve(
            *("generate", "--target", target, "--prompt-ids", "5,6,7"),
            *("--max-tokens", "4", "--ignore-eos", "--json"),
        )
        assert done.returncode == 0, done
