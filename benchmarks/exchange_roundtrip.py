"""What one dispatch and its combine cost between two processes: grpc, nixl, and NIXL alone.

    python benchmarks/exchange_roundtrip.py [--rounds N] [--json FILE]

Two processes with an expert that returns what it is sent. "bare" is the floor: a tensor's bytes
are moved into registered memory, NIXL alone writes them to a peer that writes back what it
received, each with a notification, both ends polling in a closed loop, no event loop. The three
take turns in every round, so that a machine that drifts does so for all. Also measured: the
processor time of both ends of an idle NIXL link.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from ctypes import memmove
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvloop

from moe_core.pb.epserve.v1 import expert_pb2_grpc as rpc
from moe_core.service.grpc_host import GrpcHost
from moe_core.transport.base import (
    Dispatch,
    DispatchKey,
    ExpertLink,
    Identity,
    LinkSpec,
    Reply,
    TransportOptions,
)
from moe_core.transport.connect import connect_link
from moe_core.transport.layout import SlotLayout
from moe_core.transport.nixl_agent import NixlAgent
from moe_core.transport.servicer import ExchangeServicer

HIDDEN_SIZE, TOP_K = 7168, 8
TOKENS = (1, 128)
ITERATIONS = {1: 200, 128: 20}
IDLE_S = 4.0
SPEC = LinkSpec("benchmark", torch.bfloat16, HIDDEN_SIZE, TOP_K, max(TOKENS), 3)
LAYOUT = SlotLayout(SPEC)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    num_tokens: int
    way: str
    median_us: float


def identity(dispatch: Dispatch, reply: Reply) -> None:
    reply.complete(dispatch.hidden_states, 0, 0)


async def serve_expert() -> None:
    """The other process of the two transports; ends when its stdin does."""
    servicer = ExchangeServicer(identity, SPEC, Identity(0, 1, 1), TransportOptions())
    host = GrpcHost()
    host.add(rpc.add_ExpertServiceServicer_to_server, servicer, "epserve.v1.ExpertService")
    print(await host.start("127.0.0.1", 0), flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
    await ended.wait()
    await servicer.close()
    await host.stop(0)


class Bare:
    """One end of the NIXL echo."""

    def __init__(self, name: str) -> None:
        self.agent = NixlAgent(name)
        self.region = self.agent.register(
            torch.zeros(LAYOUT.dispatch_slot_bytes * 2, dtype=torch.uint8)
        )
        self.peer = ""
        self.target = 0

    def describe(self) -> str:
        return json.dumps([self.agent.name, self.region.metadata().hex(), self.region.address])

    def meet(self, described: str) -> None:
        self.peer, metadata, self.target = json.loads(described)
        self.agent.add_peer(self.peer, bytes.fromhex(metadata))

    def handle(self, num_bytes: int, *, echo: bool) -> Any:  # noqa: ANN401 - NIXL's
        """To the front of the peer's region, from the back of this one; an echo sends what it has
        received, which lies at the front."""
        address = self.region.address + (0 if echo else LAYOUT.dispatch_slot_bytes)
        source = (address, num_bytes, 0, "DRAM")
        return self.agent.prepare_write(source, (self.target, 0, "DRAM"), self.peer)

    def store(self, values: torch.Tensor) -> None:
        memmove(self.region.address + LAYOUT.dispatch_slot_bytes, values.data_ptr(), values.nbytes)

    def send(self, handle: Any) -> None:  # noqa: ANN401
        done = self.agent.post(handle, b"x")
        while not done:
            done = self.agent.done(handle)

    def receive(self) -> None:
        while not self.agent.notifications():
            os.sched_yield()


def serve_bare() -> None:
    """The other process of the echo: `num_tokens count` a line."""
    end = Bare(f"echo-{os.getpid()}")
    print(end.describe(), flush=True)
    end.meet(sys.stdin.readline())
    for line in sys.stdin:
        num_tokens, count = map(int, line.split())
        handle = end.handle(LAYOUT.payload_bytes(num_tokens), echo=True)
        for _ in range(count):
            end.receive()
            end.send(handle)
        end.agent.release(handle)


def time_bare(end: Bare, child: "subprocess.Popen[str]", num_tokens: int) -> list[float]:
    count = ITERATIONS[num_tokens]
    handle = end.handle(LAYOUT.dispatch_bytes(num_tokens), echo=False)
    assert child.stdin is not None
    print(num_tokens, count, file=child.stdin, flush=True)
    hidden_states = torch.randn(num_tokens, HIDDEN_SIZE).to(SPEC.dtype)
    samples = []
    for _ in range(count):
        started = time.perf_counter()
        end.store(hidden_states)
        end.send(handle)
        end.receive()
        samples.append(time.perf_counter() - started)
    end.agent.release(handle)
    return samples


async def time_link(link: ExpertLink, num_tokens: int) -> list[float]:
    dispatch = Dispatch(
        DispatchKey(0, 0, 0),
        torch.randn(num_tokens, HIDDEN_SIZE).to(SPEC.dtype),
        torch.zeros(num_tokens, TOP_K, dtype=torch.int32),
        torch.ones(num_tokens, TOP_K),
    )
    samples = []
    for _ in range(ITERATIONS[num_tokens]):
        started = time.perf_counter()
        pending = await link.dispatch(dispatch, 10.0)
        await pending.wait(10.0)
        pending.release()
        samples.append(time.perf_counter() - started)
    return samples


def spawn(what: str) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "--end", what]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def cpu_seconds(pid: int) -> float:
    """Of all threads, from the scheduler's nanoseconds."""
    stats = (task / "schedstat" for task in Path(f"/proc/{pid}/task").iterdir())
    return sum(int(stat.read_text().split()[0]) for stat in stats) / 1e9


async def idle_cpu(pids: dict[str, int]) -> dict[str, float]:
    """Percent of a core, by end."""
    await asyncio.sleep(2.0)
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    await asyncio.sleep(IDLE_S)
    return {name: (cpu_seconds(pid) - before[name]) / IDLE_S * 100 for name, pid in pids.items()}


async def measure(rounds: int) -> tuple[list[Case], dict[str, float]]:
    expert, echo = spawn("expert"), spawn("bare")
    assert expert.stdout is not None
    assert echo.stdout is not None
    assert echo.stdin is not None
    try:
        address = f"127.0.0.1:{expert.stdout.readline().strip()}"
        links = {
            way: await connect_link(
                address, SPEC, Identity(rank, 2, 1), Identity(0, 1, 0), TransportOptions(way)
            )
            for rank, way in enumerate(("grpc", "nixl"))
        }
        end = Bare(f"bench-{os.getpid()}")
        print(end.describe(), file=echo.stdin, flush=True)
        end.meet(echo.stdout.readline())
        samples: dict[tuple[int, str], list[float]] = {}
        for turn in range(rounds + 1):
            for num_tokens in TOKENS:
                taken = {way: await time_link(link, num_tokens) for way, link in links.items()}
                taken["bare"] = time_bare(end, echo, num_tokens)
                for way, values in taken.items():
                    if turn > 0:  # the first round sets connections up
                        samples.setdefault((num_tokens, way), []).extend(values)
        await links["grpc"].close()
        idle = await idle_cpu({"attention": os.getpid(), "expert": expert.pid})
        await links["nixl"].close()
    finally:
        for child in (expert, echo):
            child.communicate(timeout=20)
    cases = [Case(n, way, statistics.median(v) * 1e6) for (n, way), v in samples.items()]
    return cases, idle


def report(cases: list[Case], idle: dict[str, float]) -> dict[str, Any]:
    medians = {(case.num_tokens, case.way): case.median_us for case in cases}
    rows = []
    titles = ("grpc µs", "nixl µs", "bare µs", "grpc/nixl", "nixl/bare")
    print(f"{'shape':>12}" + "".join(f"{title:>11}" for title in titles))
    for n in TOKENS:
        grpc_us, nixl_us, bare_us = (medians[n, way] for way in ("grpc", "nixl", "bare"))
        print(
            f"[{n:>3}, {HIDDEN_SIZE}] {grpc_us:>10.0f} {nixl_us:>10.1f} {bare_us:>10.1f} "
            f"{grpc_us / nixl_us:>10.1f} {nixl_us / bare_us:>10.2f}"
        )
        rows.append({"num_tokens": n, "grpc_us": grpc_us, "nixl_us": nixl_us, "bare_us": bare_us})
    print(", ".join(f"idle {name}: {percent:.2f}% of a core" for name, percent in idle.items()))
    return {"rows": rows, "idle_percent": idle, "hidden_size": HIDDEN_SIZE, "dtype": "bfloat16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--end", choices=("expert", "bare"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.end == "bare":
        serve_bare()
    elif arguments.end == "expert":
        uvloop.run(serve_expert())
    else:
        figures = report(*uvloop.run(measure(arguments.rounds)))
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
