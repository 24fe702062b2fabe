"""The gateway process: what it is made of, and the order in which it starts and ends.

gRPC and HTTP are two doors to the same parts, on one event loop.

Knows the parts and how they are wired. Ready means: every process of both tiers has been READY
once, all expert processes are READY now, and at least one DP group can take requests.
"""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

import structlog

from gateway.admission import ServedModel
from gateway.attention_pool import AttentionPool
from gateway.balancer import usable_groups
from gateway.cluster import Registry
from gateway.cluster_servicer import ClusterServicer
from gateway.generation import Generator
from gateway.http.app import make_app
from gateway.http.chat_template import ChatTemplate
from gateway.http.host import HttpHost
from gateway.metrics.requests import RequestMetrics
from gateway.page.routes import page_routes
from gateway.servicer import GatewayServicer
from gateway.tokenizer import TextTokenizer
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.cluster import ClusterState, Member, MemberState, Role
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.placement import ExpertPlacement
from moe_core.service import lifecycle
from moe_core.service.addresses import host_id, join_address, new_instance_epoch
from moe_core.service.grpc_host import GrpcHost

log = structlog.get_logger(__name__)

STOP_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """`model` is a Hugging Face directory; `model_name` None: the directory's name. `port` is
    gRPC's; 0 is any free one, also for http_port."""

    model: Path
    host: str
    port: int
    parallel: ParallelConfig
    model_name: str | None = None
    http_port: int = 0


def main(settings: GatewaySettings) -> int:
    """Run a gateway until a signal; returns the exit status."""
    return lifecycle.run(GatewayService(settings))


class GatewayService:
    """`port` and `http_port` are the bound ones once `startup` has returned."""

    name = "gateway"

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._host = GrpcHost()
        self._http = HttpHost()
        self._pool = AttentionPool()
        self._generator: Generator | None = None
        self._registry: Registry | None = None
        self._cluster: ClusterServicer | None = None
        self.port = settings.port
        self.http_port = settings.http_port

    async def startup(self) -> None:
        settings = self._settings
        config, fingerprint = await asyncio.to_thread(_read_checkpoint, settings.model)
        parallel = settings.parallel.with_model(config)
        placement = ExpertPlacement.initial(config, parallel)
        tokenizer = TextTokenizer.from_directory(settings.model)
        chat_template = ChatTemplate.from_directory(settings.model)
        name = settings.model_name or settings.model.resolve().name
        registry = Registry(self._as_member(), parallel, placement, fingerprint)
        self._registry = registry
        model = ServedModel(name, config, tokenizer)
        metrics = RequestMetrics(name, model.max_model_len)
        self._generator = Generator(model, registry, self._pool, metrics)
        self._cluster = ClusterServicer(registry)
        self._cluster.add_to(self._host)
        GatewayServicer(self._generator, registry).add_to(self._host)
        self.port = await self._host.start(settings.host, settings.port)
        page = page_routes(registry, model, metrics.registry)
        app = make_app(self._generator, registry, chat_template, extra_routes=page)
        self.http_port = await self._http.start(app, settings.host, settings.http_port)
        address = join_address(settings.host, self.port)
        registry.set_address(address)
        http = f"http://{join_address(settings.host, self.http_port)}"
        log.info("listening", address=address, http=http, model=name)

    async def serve(self) -> None:
        """Follow the cluster: health, and the streams to groups that have left."""
        registry = self._registry
        assert registry is not None, "startup comes first"
        version, been_complete, ready = 0, False, False
        while True:
            state = await registry.newer_than(version)
            version = state.version
            been_complete = been_complete or _complete(state)
            self._pool.reconcile(state)
            if ready != (been_complete and _able(state)):
                ready = not ready
                self._host.set_ready(ready)
                log.info("ready" if ready else "not ready", missing=_missing(state))
                registry.set_gateway(MemberState.READY if ready else MemberState.CONNECTING)

    async def drain(self) -> None:
        self._host.set_ready(False)
        if self._registry is not None:
            self._registry.set_gateway(MemberState.DRAINING)
        try:
            if self._generator is not None:
                await self._generator.drain()
        finally:
            if self._cluster is not None:
                self._cluster.close()
            await self._pool.close()
            await self._http.stop(STOP_GRACE_S)
            await self._host.stop(STOP_GRACE_S)

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
    return not state.missing(Role.EXPERT) and bool(usable_groups(state))
