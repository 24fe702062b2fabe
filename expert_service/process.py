"""One process of the expert tier, from its settings to its end.

Knows the order of things: address, membership, weights, exchange. Knows no arithmetic and no
wire; expert_runner.py, batcher.py and moe_core/transport do.
"""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import torch

from expert_service.batcher import Batcher
from expert_service.expert_runner import ExpertRunner
from expert_service.servicer import ExchangeGate
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.expert_loader import load_expert_weights
from moe_core.checkpoint.progress import shown_progress
from moe_core.cluster import Join, MemberState, Role
from moe_core.devices import resolve_device, resolve_dtype, set_threads
from moe_core.exchange import link_spec
from moe_core.model.linear import packing_pays
from moe_core.service.addresses import advertised_address, host_id, new_instance_epoch
from moe_core.service.binding import keep_libraries_on, require_safe_bind
from moe_core.service.certificates import Certificates
from moe_core.service.grpc_host import GrpcHost
from moe_core.service.lifecycle import DRAIN_TIMEOUT_S, run
from moe_core.service.logs import bind_rank
from moe_core.service.membership import Membership
from moe_core.service.own_thread import in_own_thread
from moe_core.service.peer_roles import PeerRole
from moe_core.service.tls_files import TlsFiles
from moe_core.service.trace_option import check_traces_endpoint, open_spans
from moe_core.transport.base import Identity, TransportOptions
from moe_core.transport.servicer import ExchangeServicer

if TYPE_CHECKING:
    from moe_core.service.tracing import Spans

log = structlog.get_logger(__name__)

JOIN_TIMEOUT_S = 60.0
STOP_GRACE_S = 1.0
IDLE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ExpertSettings:
    """host and port are listened on (port 0: any free one); `rank` None asks the gateway for
    the lowest free one; `threads` None leaves torch's own choice of intra-op threads. `insecure`
    allows a host that others reach without `tls`."""

    gateway: str
    model: Path
    host: str = "127.0.0.1"
    port: int = 0
    advertise_address: str | None = None
    rank: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    transport: str = "auto"
    threads: int | None = None
    tls: TlsFiles | None = None
    insecure: bool = False
    drain_timeout_s: float = DRAIN_TIMEOUT_S
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        require_safe_bind("host", self.host, self.tls, self.insecure)
        check_traces_endpoint(self.otlp_traces_endpoint)


class ExpertProcess:
    """The life of one expert process; see moe_core.service.lifecycle.Service."""

    name = "expert"

    def __init__(self, settings: ExpertSettings) -> None:
        self._settings = settings
        self._device = resolve_device(settings.device)
        self._options = TransportOptions(transport=settings.transport, devices=(str(self._device),))
        self._epoch = new_instance_epoch()
        self._gate = ExchangeGate()
        self._tls = Certificates.of(settings.tls, PeerRole.EXPERT)
        self._host = GrpcHost(self._tls)
        self._membership: Membership | None = None
        self._batcher: Batcher | None = None
        self._spans: Spans | None = None
        self.weight_bytes_read = 0  # of the checkpoint's tensors

    async def startup(self) -> None:
        """Raises ConfigError, CheckpointError or UnavailableError."""
        keep_libraries_on(self._settings.host)
        set_threads(self._settings.threads)
        checkpoint = await asyncio.to_thread(Checkpoint.open, self._settings.model)
        fingerprint = await asyncio.to_thread(checkpoint.fingerprint)
        dtype = resolve_dtype(self._settings.dtype, checkpoint.config.dtype)
        self._gate.add_to(self._host)
        port = await self._host.start(self._settings.host, self._settings.port)
        membership = await self._join(port, fingerprint, dtype)
        runner = await self._load(membership, checkpoint, dtype)
        self._batcher = self._make_batcher(runner, membership.rank)
        self._gate.open(self._servicer(membership, checkpoint, fingerprint, dtype, self._batcher))
        self._host.set_ready(True)
        membership.report(MemberState.READY)

    async def serve(self) -> None:
        """Until the gateway is lost or a run of experts has failed."""
        assert self._membership is not None
        assert self._batcher is not None
        lost = asyncio.create_task(self._membership.lost(), name="membership lost")
        try:
            await asyncio.wait({lost, self._batcher.failed}, return_when=asyncio.FIRST_COMPLETED)
            for ended in (self._batcher.failed, lost):
                if ended.done():
                    ended.result()
        finally:
            lost.cancel()
            await asyncio.wait({lost})

    async def drain(self) -> None:
        self._host.set_ready(False)
        if self._membership is not None:
            self._membership.report(MemberState.DRAINING)
        if self._batcher is not None:
            await self._batcher.idle(IDLE_TIMEOUT_S)
        await self._gate.close()
        await self._host.stop(STOP_GRACE_S)
        if self._membership is not None:
            await self._membership.close()
        if self._spans is not None:
            await self._spans.close()

    async def _join(self, port: int, fingerprint: str, dtype: torch.dtype) -> Membership:
        settings = self._settings
        join = Join(
            role=Role.EXPERT,
            address=advertised_address(
                settings.host, port, settings.advertise_address, settings.gateway
            ),
            device=str(self._device),
            pid=os.getpid(),
            model_fingerprint=fingerprint,
            instance_epoch=self._epoch,
            dtype=str(dtype).removeprefix("torch."),
            host_id=host_id(),
            rank=settings.rank,
        )
        self._membership = await Membership.join(
            settings.gateway, join, timeout_s=JOIN_TIMEOUT_S, tls=self._tls
        )
        bind_rank(self._membership.rank)
        return self._membership

    async def _load(
        self, membership: Membership, checkpoint: Checkpoint, dtype: torch.dtype
    ) -> ExpertRunner:
        """Loads this rank's experts off the loop."""
        parallel = membership.parallel.with_model(checkpoint.config)
        placement = membership.state.placement
        ep_rank, etp_rank = parallel.expert_ranks(membership.rank)
        membership.report(MemberState.LOADING)
        packed = await in_own_thread(packing_pays, dtype, self._device)
        with shown_progress(f"expert {membership.rank}: loading experts", "layer") as progress:
            weights = await in_own_thread(
                load_expert_weights,
                checkpoint,
                placement=placement,
                ep_rank=ep_rank,
                etp_rank=etp_rank,
                etp_size=parallel.etp_size,
                shared_expert=parallel.shared_on_experts,
                dtype=dtype,
                device=self._device,
                packed=packed,
                progress=progress,
            )
        self.weight_bytes_read = checkpoint.bytes_read
        log.info(
            "experts loaded",
            rank=membership.rank,
            packed=packed,
            experts_per_layer=placement.num_local_experts(ep_rank),
            bytes_read=checkpoint.bytes_read,
        )
        return ExpertRunner(weights, placement, ep_rank, self._device)

    def _make_batcher(self, runner: ExpertRunner, rank: int) -> Batcher:
        self._spans = open_spans(self._settings.otlp_traces_endpoint, self.name, rank)
        if self._spans is None:
            return Batcher(runner)
        from expert_service.traces import BatchTraces

        return Batcher(runner, BatchTraces(self._spans))

    def _servicer(
        self,
        membership: Membership,
        checkpoint: Checkpoint,
        fingerprint: str,
        dtype: torch.dtype,
        batcher: Batcher,
    ) -> ExchangeServicer:
        parallel = membership.parallel
        spec = link_spec(
            checkpoint.config,
            parallel,
            model_fingerprint=fingerprint,
            dtype=dtype,
            spare_slots=self._options.spare_slots,
        )
        identity = Identity(membership.rank, parallel.expert_devices, self._epoch)
        return ExchangeServicer(
            batcher.submit,
            spec,
            identity,
            self._options,
            attention_world=lambda: membership.state.room(Role.ATTN),
        )


def main(settings: ExpertSettings) -> int:
    """Runs one expert process to its end and returns its exit status."""
    return run(ExpertProcess(settings), drain_timeout_s=settings.drain_timeout_s)
