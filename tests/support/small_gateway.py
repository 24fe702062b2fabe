"""A gateway's parts wired without a checkpoint, for tests of its servicers.

Knows the gateway's parts; the real wiring is gateway/process.py's.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType

from gateway.admin_servicer import AdminServicer
from gateway.admission import ServedModel
from gateway.api_keys import ApiKeys
from gateway.attention_pool import AttentionPool
from gateway.cluster import Registry
from gateway.cluster_servicer import ClusterServicer
from gateway.entrance import QueueLimits
from gateway.generation import Generator
from gateway.leadership import SoleGateway
from gateway.leases import Clock
from gateway.observers import RequestObserver
from gateway.placement_leader import PlacementLeader
from gateway.rebalancing import Rebalancer
from gateway.scaling import Scaling
from gateway.servicer import GatewayServicer
from gateway.tokenizer import TextTokenizer
from gateway.vllm_servicer import VllmServicer
from moe_core.cluster import ClusterState, Member, MemberState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.pb.epserve.v1 import cluster_pb2_grpc, gateway_pb2_grpc
from moe_core.pb.epserve.v1.attention_pb2_grpc import AttentionServiceServicer
from moe_core.placement import ExpertPlacement
from moe_core.service.certificates import Certificates
from moe_core.service.grpc_channel import open_channel
from moe_core.service.grpc_host import GrpcHost
from support.fake_attention import FakeWorker
from support.moe_configs import moe_model

FINGERPRINT = "blake3:11"
MODEL = moe_model()
MODEL_DIRECTORY = Path("/models/small")


def make_registry(
    parallel: ParallelConfig | None = None, clock: Clock = time.monotonic
) -> Registry:
    settled = (parallel or ParallelConfig()).with_model(MODEL)
    placement = ExpertPlacement.initial(MODEL, settled)
    gateway = Member(Role.GATEWAY, 0, 1, "127.0.0.1:1", "cpu", MemberState.CONNECTING, 1, "here")
    return Registry(gateway, settled, placement, FINGERPRINT, clock)


class SmallGateway:
    def __init__(
        self,
        parallel: ParallelConfig | None = None,
        tokenizer: TextTokenizer | None = None,
        limits: QueueLimits | None = None,
        observer: RequestObserver | None = None,
        *,
        attn_wait_s: float = 0.3,
        tls: Certificates | None = None,
        keys: ApiKeys | None = None,
    ) -> None:
        """With `tls`, `channel` and the stubs know no certificate and are of no use."""
        self._keys = keys or ApiKeys(None)
        self._tls = tls
        self.registry = make_registry(parallel)
        self.pool = AttentionPool(tls)
        model = ServedModel("small", MODEL, tokenizer)
        self.generator = Generator(
            model, self.registry, self.pool, limits, observer, attn_wait_s=attn_wait_s
        )
        self.cluster = ClusterServicer(self.registry, SoleGateway())
        self._host = GrpcHost(tls, self._keys.authenticate)
        self._port = 0
        self._closers: list[Callable[[], Awaitable[None]]] = []

    def at(self, port: int) -> "SmallGateway":
        """The same on a port of the caller's choice."""
        self._port = port
        return self

    async def __aenter__(self) -> "SmallGateway":
        self.cluster.add_to(self._host)
        leader = PlacementLeader(self.registry, SoleGateway())
        scaling = Scaling(self.registry, leader, MODEL)
        rebalancer = Rebalancer(self.registry, leader)
        AdminServicer(self.registry, scaling, rebalancer, SoleGateway()).add_to(self._host)
        GatewayServicer(self.generator, self.registry).add_to(self._host)
        VllmServicer(self.generator, self.registry, MODEL_DIRECTORY).add_to(self._host)
        cluster_port = None if self._tls is None else 0
        port = await self._host.start("127.0.0.1", self._port, cluster_port=cluster_port)
        self.address = f"127.0.0.1:{port}"
        self.cluster_address = f"127.0.0.1:{self._host.cluster_port}"
        self.channel = open_channel(self.address)
        self.stub = gateway_pb2_grpc.GatewayStub(self.channel)
        self.cluster_stub = cluster_pb2_grpc.ClusterServiceStub(self.channel)
        self._following = asyncio.create_task(self._follow())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for close in self._closers:
            await close()
        await self.channel.close()
        self._following.cancel()
        await asyncio.wait({self._following})
        self.cluster.close()
        self.registry.versions.close()
        await self.pool.close()
        await self._host.stop(0.2)

    async def _follow(self) -> None:
        version = 0
        while True:
            state = await self.registry.versions.newer_than(version)
            version = state.version
            self.pool.reconcile(state)
            self.generator.reconcile()

    def worker(self, role: Role, rank: int | None = None) -> FakeWorker:
        return FakeWorker(self.address, FINGERPRINT, role, rank)

    async def add_worker(
        self,
        role: Role,
        fake: AttentionServiceServicer | None = None,
        *,
        rank: int | None = None,
        total_kv_blocks: int = 64,
        max_num_seqs: int = 64,
    ) -> FakeWorker:
        """A worker that has joined and is READY, stopped when this gateway is."""
        worker = self.worker(role, rank)
        await worker.start(fake, total_kv_blocks=total_kv_blocks, max_num_seqs=max_num_seqs)
        self._closers.append(worker.stop)
        await worker.membership.wait_until(
            lambda state: is_ready(state, role, worker.membership.rank), 10, "this worker"
        )
        return worker


def is_ready(state: ClusterState, role: Role, rank: int) -> bool:
    return any(
        member.rank == rank and member.state is MemberState.READY for member in state.tier(role)
    )
