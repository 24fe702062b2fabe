"""One process of the expert tier, from its settings to its end.

Knows the order of things: address, membership, weights, exchange. Knows no arithmetic and no
wire; expert_runner.py, batcher.py and moe_core/transport do.
"""

import asyncio
import os
from typing import TYPE_CHECKING

import structlog
import torch

from expert_service.batcher import Batcher
from expert_service.expert_bytes import ExpertForm
from expert_service.expert_runner import ExpertRunner
from expert_service.expert_sources import DiskSource, PeerSource
from expert_service.handovers import Handovers
from expert_service.preparation import Preparation, still_needed
from expert_service.servicer import ExchangeGate
from expert_service.settings import ExpertSettings
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.expert_loader import ExpertShard, load_expert_weights
from moe_core.checkpoint.progress import shown_progress
from moe_core.cluster import Join, MemberState, Role
from moe_core.devices import resolve_device, resolve_dtype, set_threads
from moe_core.exchange import link_spec
from moe_core.model.fastest_form import fastest_form
from moe_core.service.addresses import advertised_address, host_id, new_instance_epoch
from moe_core.service.binding import keep_libraries_on
from moe_core.service.certificates import Certificates
from moe_core.service.grpc_host import GrpcHost
from moe_core.service.leaving import told_to_leave
from moe_core.service.lifecycle import run
from moe_core.service.logs import bind_rank
from moe_core.service.membership import Membership
from moe_core.service.own_thread import gently, in_own_thread
from moe_core.service.peer_roles import PeerRole
from moe_core.service.trace_option import open_spans
from moe_core.transport.base import Identity, TransportOptions
from moe_core.transport.servicer import ExchangeServicer

if TYPE_CHECKING:
    from moe_core.service.tracing import Spans

__all__ = ["ExpertProcess", "ExpertSettings", "main"]

log = structlog.get_logger(__name__)

JOIN_TIMEOUT_S = 60.0
STOP_GRACE_S = 1.0
IDLE_TIMEOUT_S = 5.0
UNNEEDED_TIMEOUT_S = 10.0


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
        self._source: PeerSource | None = None
        self._preparation: Preparation | None = None
        self._spans: Spans | None = None
        self._draining = False
        self._checkpoint: Checkpoint | None = None

    @property
    def weight_bytes_read(self) -> int:
        """Of the checkpoint's tensors, since the process began."""
        return 0 if self._checkpoint is None else self._checkpoint.bytes_read

    @property
    def weight_bytes_fetched(self) -> int:
        """Of experts that peers have given, since the process began."""
        return 0 if self._source is None else self._source.bytes_fetched

    async def startup(self) -> None:
        """Raises ConfigError, CheckpointError or UnavailableError."""
        keep_libraries_on(self._settings.host)
        set_threads(self._settings.threads)
        checkpoint = await asyncio.to_thread(Checkpoint.open, self._settings.model)
        self._checkpoint = checkpoint
        fingerprint = await asyncio.to_thread(checkpoint.fingerprint)
        dtype = resolve_dtype(self._settings.dtype, checkpoint.config.dtype)
        self._gate.add_to(self._host)
        port = await self._host.start(self._settings.host, self._settings.port)
        membership = await self._join(port, fingerprint, dtype)
        shard = await self._shard(membership, dtype)
        runner = await self._load(membership, checkpoint, shard)
        self._batcher = self._make_batcher(runner, membership.rank)
        identity = Identity(membership.rank, membership.parallel.expert_devices, self._epoch)
        exchange = self._servicer(membership, identity, checkpoint, dtype, self._batcher)
        form = ExpertForm.of(checkpoint.config, shard)
        handovers = Handovers(
            runner, form, fingerprint, identity, self._options, exchange.endpoint, self._tls
        )
        self._gate.open(exchange, handovers.servicer)
        disk = DiskSource(checkpoint, shard)
        self._source = PeerSource(form, membership.rank, handovers.connect, disk)
        self._preparation = Preparation(
            membership,
            runner,
            self._batcher,
            self._source,
            self._report,
            self._settings.spare_expert_slots,
        )
        self._host.set_ready(True)
        self._report()

    async def serve(self) -> None:
        """Until the gateway is lost, a run of experts has failed, or the placement in use cannot be
        served."""
        assert self._membership is not None
        assert self._batcher is not None
        assert self._preparation is not None
        jobs = [
            asyncio.create_task(self._membership.lost(), name="membership lost"),
            asyncio.create_task(self._preparation.run(), name="preparation"),
        ]
        failed = self._batcher.failed
        try:
            await asyncio.wait({*jobs, failed}, return_when=asyncio.FIRST_COMPLETED)
            for ended in (failed, *jobs):
                if ended.done():
                    ended.result()
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.wait(jobs)

    async def asked_to_leave(self) -> None:
        """Returns once nobody needs this process any more, or has needed it for long enough."""
        membership = self._membership
        assert membership is not None
        await told_to_leave(membership, Role.EXPERT)
        ep_rank, _ = self._ranks(membership)
        try:
            async with asyncio.timeout(UNNEEDED_TIMEOUT_S):
                state = membership.state
                while still_needed(state, ep_rank):
                    state = await membership.next_state(state)
        except TimeoutError:
            log.warning("leaving, although steps may still need this process", ep_rank=ep_rank)

    def _report(self) -> None:
        assert self._membership is not None
        assert self._preparation is not None
        self._membership.report(
            MemberState.DRAINING if self._draining else MemberState.READY,
            detail=self._preparation.refusal,
            prepared_epoch=self._preparation.prepared_epoch,
            refused_epoch=self._preparation.refused_epoch,
        )

    async def drain(self) -> None:
        self._draining = True
        self._host.set_ready(False)
        if self._preparation is not None:
            self._report()
        elif self._membership is not None:
            self._membership.report(MemberState.DRAINING)
        try:
            if self._batcher is not None:
                await self._batcher.idle(IDLE_TIMEOUT_S)
        finally:
            await self._close()

    async def _close(self) -> None:
        """Also where the drain was cut short."""
        if self._source is not None:
            await self._source.close()
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

    @staticmethod
    def _ranks(membership: Membership) -> tuple[int, int]:
        """(ep_rank, etp_rank); the sizes that a worker is told have room for its rank."""
        return membership.parallel.expert_ranks(membership.rank)

    async def _shard(self, membership: Membership, dtype: torch.dtype) -> ExpertShard:
        form = await in_own_thread(fastest_form, dtype, self._device)
        _, etp_rank = self._ranks(membership)
        return ExpertShard(etp_rank, membership.parallel.etp_size, dtype, self._device, form)

    async def _load(
        self, membership: Membership, checkpoint: Checkpoint, shard: ExpertShard
    ) -> ExpertRunner:
        """Loads this rank's experts off the loop; none where the placement gives it none yet."""
        parallel = membership.parallel.with_model(checkpoint.config)
        placement = membership.state.placement
        ep_rank, _ = self._ranks(membership)
        membership.report(MemberState.LOADING)
        with shown_progress(f"expert {membership.rank}: loading experts", "layer") as progress:
            weights = await in_own_thread(
                gently(self._settings.load_niceness, load_expert_weights),
                checkpoint,
                placement=placement,
                ep_rank=ep_rank,
                etp_rank=shard.etp_rank,
                etp_size=shard.etp_size,
                shared_expert=parallel.shared_on_experts,
                dtype=shard.dtype,
                device=self._device,
                form=shard.form,
                progress=progress,
            )
        log.info(
            "experts loaded",
            rank=membership.rank,
            matrix_form=str(shard.form),
            placement_epoch=placement.epoch,
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
        identity: Identity,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        batcher: Batcher,
    ) -> ExchangeServicer:
        spec = link_spec(
            checkpoint.config,
            membership.parallel,
            model_fingerprint=checkpoint.fingerprint(),
            dtype=dtype,
            spare_slots=self._options.spare_slots,
        )
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
