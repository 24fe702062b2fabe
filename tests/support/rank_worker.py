"""A process that is one rank of one layout after the other, as its parent tells it.

Reads one JSON command a line from stdin and answers one JSON line on stdout. Loading torch takes
longer than a case does, so the suite starts a few of these once and gives them all cases.
Knows the commands; layout_rank.py knows how a rank is built.
"""

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import uvloop

from attn_service import tensor_parallel
from attn_service.peers import Peers
from moe_core.config.parallel import ParallelConfig
from moe_core.model.tensor_parallel import NoTensorParallel, TensorParallel
from moe_core.pb.epserve.v1 import expert_pb2_grpc
from moe_core.service.grpc_host import GrpcHost
from moe_core.transport.base import ExpertLink, Identity, TransportOptions
from moe_core.transport.connect import connect_link
from moe_core.transport.local import LocalLink
from moe_core.transport.servicer import ExchangeServicer
from support.dying_links import DyingLink
from support.layout_rank import (
    GreedyBatch,
    Layout,
    build_batcher,
    build_runner,
    num_blocks,
)

HOST = "127.0.0.1"
COLLECTIVE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Command:
    """`op` is "expert", "stop", "store" or "attn"; what it does not need is left out. dies: with
    local links, an attention rank's link, by expert rank, that is lost with its chunk of that
    number; it is there again after a step that could not do without."""

    op: str
    directory: str = ""
    parallel: dict[str, object] | None = None
    dtype: str = "float32"
    device: str = "cpu"
    transport: str = "grpc"
    rank: int = 0
    instance_epoch: int = 1
    experts: tuple[str, ...] = ()
    store_port: int = 0
    batches: tuple[tuple[tuple[int, ...], ...], ...] = ()
    num_tokens: int = 0
    num_microbatches: int = 1
    dies: tuple[int, int, int] | None = None

    @property
    def layout(self) -> Layout:
        parallel = ParallelConfig(**(self.parallel or {}))  # type: ignore[arg-type]  # from JSON
        dtype = getattr(torch, self.dtype)
        return Layout(Path(self.directory), parallel, dtype, torch.device(self.device))

    @property
    def options(self) -> TransportOptions:
        return TransportOptions(
            transport=self.transport, connect_timeout_s=30.0, devices=(self.device,)
        )


class RankWorker:
    def __init__(self) -> None:
        self._host: GrpcHost | None = None
        self._servicer: ExchangeServicer | None = None
        self._store: object = None

    async def handle(self, command: Command) -> object:
        match command.op:
            case "expert":
                return await self._serve_expert(command)
            case "store":
                store = tensor_parallel.open_store(
                    HOST, command.layout.parallel.tp_size, COLLECTIVE_TIMEOUT_S
                )
                self._store = store
                return store.port
            case "attn":
                return await self._run_attention(command)
            case "stop":
                return await self._stop()
        raise ValueError(f"unknown op {command.op!r}")

    async def _serve_expert(self, command: Command) -> int:
        layout = command.layout
        batcher = build_batcher(layout, command.rank)
        identity = Identity(command.rank, layout.parallel.expert_devices, command.instance_epoch)
        self._servicer = ExchangeServicer(batcher.submit, layout.spec, identity, command.options)
        self._host = GrpcHost()
        self._host.add(
            expert_pb2_grpc.add_ExpertServiceServicer_to_server,
            self._servicer,
            "epserve.v1.ExpertService",
        )
        return await self._host.start(HOST, 0)

    async def _stop(self) -> None:
        if self._servicer is not None and self._host is not None:
            await self._servicer.close()
            await self._host.stop(1.0)
        self._servicer = self._host = None

    async def _run_attention(self, command: Command) -> object:
        layout = command.layout
        links = await self._links(command, layout)
        peers = Peers(layout.parallel.etp_size, links)
        tp = self._join_group(command, layout.parallel)
        try:
            blocks = max(num_blocks(batch, command.num_tokens) for batch in command.batches)
            runner = build_runner(layout, tp, peers, blocks)
            repair = partial(self._repair, layout, peers)
            greedy = GreedyBatch(*runner, command.num_microbatches, repair)
            decoded = [
                [asdict(one) for one in await greedy.decode(batch, command.num_tokens)]
                for batch in command.batches
            ]
            lost = [each.lost_because for each in links]
        finally:
            tensor_parallel.dissolve()
            self._store = None
            for link in links:
                await link.close()
        counters = [{"transport": each.transport, **asdict(each.counters)} for each in links]
        return {
            "batches": decoded,
            "links": counters,
            "lost": lost,
            "lost_steps": greedy.lost_steps,
        }

    def _repair(self, layout: Layout, peers: Peers) -> None:
        for rank, link in tuple(peers.links.items()):
            if link.lost_because is not None:
                peers.put(rank, LocalLink(build_batcher(layout, rank).submit, layout.spec))

    async def _links(self, command: Command, layout: Layout) -> Sequence[ExpertLink]:
        world = layout.parallel.expert_devices
        if command.transport == "local":
            batchers = [build_batcher(layout, rank) for rank in range(world)]
            links = [DyingLink(batcher.submit, layout.spec) for batcher in batchers]
            if command.dies is not None and command.dies[0] == command.rank:
                links[command.dies[1]].dies_at = command.dies[2]
                links[command.dies[1]].moment = "posted"
            return links
        identity = Identity(command.rank, layout.parallel.attn_devices, command.instance_epoch)
        peers = [Identity(rank, world, command.instance_epoch) for rank in range(world)]
        return [
            await connect_link(address, layout.spec, identity, peer, command.options)
            for address, peer in zip(command.experts, peers, strict=True)
        ]

    def _join_group(self, command: Command, parallel: ParallelConfig) -> TensorParallel:
        if parallel.tp_size == 1:
            return NoTensorParallel()
        dp_rank, tp_rank = parallel.attention_ranks(command.rank)
        group = tensor_parallel.GroupRank(dp_rank, tp_rank, parallel.tp_size)
        store = self._store or tensor_parallel.join_store(
            HOST, command.store_port, parallel.tp_size, COLLECTIVE_TIMEOUT_S
        )
        device = torch.device(command.device)
        return tensor_parallel.form(group, store, device, COLLECTIVE_TIMEOUT_S)


async def main() -> None:
    # Libraries may print; the answers have a descriptor of their own.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader(limit=1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    worker = RankWorker()
    while line := await commands.readline():
        try:
            answer = {"ok": await worker.handle(Command(**json.loads(line)))}
        except Exception as error:  # the parent raises it again
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    await worker.handle(Command("stop"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    uvloop.run(main())
