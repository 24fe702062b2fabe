"""The gateway process: what it is made of, and the order in which it starts and ends.

gRPC and HTTP are two doors to the same parts, on one event loop.

Knows the parts and how they are wired. Ready means: every process of both tiers has been READY
once, all expert processes are READY now, and at least one DP group can take requests.
"""

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from gateway.admin_servicer import AdminServicer
from gateway.admission import ServedModel
from gateway.api_keys import ApiKeys
from gateway.attention_pool import AttentionPool
from gateway.cluster import Registry
from gateway.cluster_servicer import ClusterServicer
from gateway.election import Election
from gateway.etcd_store import EtcdStore
from gateway.generation import Generator
from gateway.groups import usable_groups, why_unusable
from gateway.http.app import make_app
from gateway.http.chat_template import ChatTemplate
from gateway.http.host import HttpHost
from gateway.leadership import Leadership, SoleGateway
from gateway.metrics.exposition import metrics_routes
from gateway.metrics.requests import RequestMetrics
from gateway.observers import BothObservers, RequestObserver
from gateway.page.routes import page_routes
from gateway.placement_leader import PlacementLeader
from gateway.rebalancing import Rebalancer
from gateway.scaling import Scaling
from gateway.servicer import GatewayServicer
from gateway.settings import GatewaySettings
from gateway.tokenizer import TextTokenizer
from gateway.vllm_servicer import VllmServicer
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.cluster import ClusterState, Member, MemberState, Role
from moe_core.config.model import ModelConfig
from moe_core.placement import ExpertPlacement
from moe_core.service import lifecycle
from moe_core.service.addresses import (
    host_id,
    join_address,
    new_instance_epoch,
)
from moe_core.service.certificates import Certificates, expecting
from moe_core.service.grpc_host import GrpcHost
from moe_core.service.lease import PERIOD_S
from moe_core.service.logs import bind_rank
from moe_core.service.peer_roles import PeerRole
from moe_core.service.trace_option import open_spans

if TYPE_CHECKING:
    from moe_core.service.tracing import Spans

log = structlog.get_logger(__name__)

STOP_GRACE_S = 1.0


def main(settings: GatewaySettings) -> int:
    """Run a gateway until a signal; returns the exit status."""
    return lifecycle.run(GatewayService(settings), drain_timeout_s=settings.drain_timeout_s)


class GatewayService:
    """`port`, `http_port` and `cluster_port` (None without TLS) are the bound ones once `startup`
    has returned."""

    name = "gateway"

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        tls = self._tls = Certificates.of(settings.tls, PeerRole.GATEWAY)
        self._keys = ApiKeys(settings.api_keys, launcher_key_hash=settings.launcher_key_hash)
        self._host = GrpcHost(tls, self._keys.authenticate)
        self._http = HttpHost(tls)
        self._pool = AttentionPool(tls)
        self._generator: Generator | None = None
        self._registry: Registry | None = None
        self._cluster: ClusterServicer | None = None
        self._rebalancer: Rebalancer | None = None
        self._election: Election | None = None
        self._spans: Spans | None = None
        self._draining = False
        self.port = settings.port
        self.http_port = settings.http_port
        self.cluster_port: int | None = None

    async def startup(self) -> None:
        settings = self._settings
        bind_rank(0)
        config, fingerprint = await asyncio.to_thread(_read_checkpoint, settings.model)
        parallel = settings.parallel.with_model(config)
        placement = ExpertPlacement.initial(config, parallel)
        tokenizer = TextTokenizer.from_directory(settings.model)
        chat_template = ChatTemplate.from_directory(settings.model)
        directory = settings.model.resolve()
        name = settings.model_name or directory.name
        registry = Registry(self._as_member(), parallel, placement, fingerprint)
        self._registry = registry
        model = ServedModel(name, config, tokenizer)
        metrics = RequestMetrics(name, model.max_model_len)
        observer = self._observer(metrics)
        self._generator = Generator(
            model,
            registry,
            self._pool,
            settings.limits,
            observer,
            attn_wait_s=settings.attn_wait_s,
        )
        leadership = self._leadership(registry, fingerprint)
        self._cluster = ClusterServicer(registry, leadership)
        self._cluster.add_to(self._host)
        leader = PlacementLeader(registry, leadership)
        self._rebalancer = Rebalancer(registry, leader, config.moe.n_group or 1)
        scaling = Scaling(registry, leader, config)
        AdminServicer(registry, scaling, self._rebalancer, leadership).add_to(self._host)
        GatewayServicer(self._generator, registry).add_to(self._host)
        VllmServicer(self._generator, registry, directory).add_to(self._host)
        cluster_port = None if settings.tls is None else settings.cluster_port
        self.port = await self._host.start(settings.host, settings.port, cluster_port=cluster_port)
        self.cluster_port = self._host.cluster_port
        extra_routes = (
            *metrics_routes(metrics, lambda: registry.state, name),
            *page_routes(registry, model, metrics.registry),
        )
        app = make_app(
            self._generator,
            registry,
            chat_template,
            authenticate=self._keys.authenticate,
            extra_routes=extra_routes,
        )
        self.http_port = await self._http.start(app, settings.host, settings.http_port)
        address = settings.advertised(self.port)
        registry.set_address(address)
        scheme = "http" if settings.tls is None else "https"
        http = f"{scheme}://{join_address(settings.host, self.http_port)}"
        log.info(
            "listening", address=address, http=http, cluster_port=self.cluster_port, model=name
        )

    async def serve(self) -> None:
        """Until cancelled, or one of its jobs fails."""
        try:
            async with asyncio.TaskGroup() as jobs:
                for name, job in self._jobs().items():
                    jobs.create_task(job, name=name)
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    def _jobs(self) -> dict[str, Coroutine[None, None, None]]:
        settings = self._settings
        jobs = {"follow the cluster": self._follow(), "count tasks": self._count_tasks()}
        if self._election is not None:
            at = self.port if self.cluster_port is None else self.cluster_port
            jobs["election"] = self._election.run(settings.cluster_address(at))
        if self._rebalancer is not None and settings.rebalance_interval:
            jobs["rebalance"] = self._rebalancer.run(settings.rebalance_interval)
        return jobs

    async def _follow(self) -> None:
        """Health, and the streams to groups that have left."""
        registry = self._registry
        assert registry is not None, "startup comes first"
        assert self._generator is not None
        version, been_complete, ready = 0, False, False
        while True:
            state = await registry.versions.newer_than(version)
            version = state.version
            been_complete = been_complete or _complete(state)
            self._pool.reconcile(state)
            self._generator.reconcile()
            if self._draining:
                continue
            if ready != (been_complete and _able(state)):
                ready = not ready
                self._host.set_ready(ready)
                log.info("ready" if ready else "not ready", missing=_missing(state))
            if ready:
                registry.set_gateway(MemberState.READY)
            else:
                registry.set_gateway(MemberState.CONNECTING, why_unusable(state))

    async def _count_tasks(self) -> None:
        """As often as workers do."""
        assert self._registry is not None, "startup comes first"
        while True:
            self._registry.loop_tasks = len(asyncio.all_tasks())
            await asyncio.sleep(PERIOD_S)

    async def drain(self) -> None:
        self._draining = True
        self._host.set_ready(False)
        if self._registry is not None:
            self._registry.set_gateway(MemberState.DRAINING)
        try:
            if self._generator is not None:
                await self._generator.drain()
        finally:
            if self._generator is not None:
                self._generator.close()
            if self._cluster is not None:
                self._cluster.close()
            if self._election is not None:
                await self._election.close()
            if self._registry is not None:
                self._registry.versions.close()
            await self._pool.close()
            await self._http.stop(STOP_GRACE_S)
            await self._host.stop(STOP_GRACE_S)
            if self._spans is not None:
                await self._spans.close()

    def _leadership(self, registry: Registry, fingerprint: str) -> Leadership:
        where = self._settings.etcd
        if where is None:
            return SoleGateway()

        def on_lost() -> None:
            if self._cluster is not None:
                self._cluster.end_registrations()

        security = expecting(self._tls, PeerRole.GATEWAY)
        self._election = Election(EtcdStore(where), registry, fingerprint, on_lost, security)
        return self._election

    def _observer(self, metrics: RequestMetrics) -> RequestObserver:
        self._spans = open_spans(self._settings.otlp_traces_endpoint, self.name, 0)
        if self._spans is None:
            return metrics
        from gateway.traces import RequestTraces

        return BothObservers(metrics, RequestTraces(self._spans))

    def _as_member(self) -> Member:
        return Member(
            role=Role.GATEWAY,
            rank=0,
            pid=os.getpid(),
            address=join_address(self._settings.host, self._settings.port),
            device="cpu",
            state=MemberState.CONNECTING,
            instance_epoch=new_instance_epoch(),
            host_id=host_id(),
        )


def _read_checkpoint(directory: Path) -> tuple[ModelConfig, str]:
    checkpoint = Checkpoint.open(directory)
    return checkpoint.config, checkpoint.fingerprint()


def _missing(state: ClusterState) -> tuple[str, ...]:
    return (*state.missing(Role.ATTN), *state.missing(Role.EXPERT))


def _complete(state: ClusterState) -> bool:
    return not _missing(state) and bool(usable_groups(state))


def _able(state: ClusterState) -> bool:
    return state.holds_all_experts(state.placement) and bool(usable_groups(state))
