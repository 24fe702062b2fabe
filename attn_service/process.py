"""One process of the attention tier, from its settings to its end.

Knows the order of things: address, membership, TP group, weights, links to the experts, duty.
Knows no arithmetic, no scheduling and no message; assembly.py puts the parts together, and
cluster_upkeep.py follows the cluster while the process serves.
"""

import asyncio
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from attn_service.assembly import (
    Kv,
    Site,
    make_cache,
    make_duty,
    make_experts,
    make_handover,
    make_links,
    microbatch_rule,
)
from attn_service.cluster_upkeep import ClusterUpkeep, connect_enough
from attn_service.duties import Duty, Leading, until_first
from attn_service.expert_links import ExpertLinks
from attn_service.follow import Followers, GroupTerms
from attn_service.group_kv import GroupKv
from attn_service.kv_agreement import KvOffer, agree
from attn_service.kv_budget import num_kv_blocks
from attn_service.kv_handover import KvHandover
from attn_service.loading import load_weights
from attn_service.placements import Placements
from attn_service.rendezvous import Group, meet
from attn_service.servicer import SERVICE_NAME, AttentionServicer, add_to_server
from attn_service.settings import AttnSettings
from attn_service.step_runner import EngineObserver
from attn_service.tensor_parallel import GroupRank, dissolve
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.cluster import ClusterState, Join, MemberState, Role
from moe_core.devices import resolve_device, resolve_dtype, set_threads
from moe_core.model.tensor_parallel import NoTensorParallel
from moe_core.service.addresses import (
    advertised_address,
    host_id,
    new_instance_epoch,
    split_address,
)
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
from moe_core.transport.base import TransportOptions
from moe_core.transport.choice import open_endpoint
from moe_core.transport.endpoint import NixlEndpoint

if TYPE_CHECKING:
    from moe_core.service.tracing import Spans

__all__ = ["AttnSettings", "main"]

log = structlog.get_logger(__name__)

JOIN_TIMEOUT_S = 60.0
ARRIVAL_TIMEOUT_S = 1800.0  # of peers that load large weights from slow disks
# A rank may wait for its experts while the others wait for it in a collective.
COLLECTIVE_MARGIN_S = 10.0
STOP_GRACE_S = 1.0


class AttentionProcess:
    """The life of one attention process; see moe_core.service.lifecycle.Service."""

    name = "attn"

    def __init__(self, settings: AttnSettings) -> None:
        self._settings = settings
        self._device = resolve_device(settings.device)
        self._options = TransportOptions(transport=settings.transport, devices=(str(self._device),))
        self._servicer = AttentionServicer()
        self._tls = Certificates.of(settings.tls, PeerRole.ATTN)
        self._host = GrpcHost(self._tls)
        self._address = ""
        self._store_address = ""
        self._membership: Membership | None = None
        self._endpoint: NixlEndpoint | None = None  # one for all links
        self._links: ExpertLinks | None = None
        self._followers: Followers | None = None
        self._duty: Duty | None = None
        self._handover: KvHandover | None = None
        self._upkeep: ClusterUpkeep | None = None
        self._spans: Spans | None = None
        self._closing = asyncio.Event()
        self._served = asyncio.Event()
        self._served.set()  # it has not begun

    async def startup(self) -> None:
        """Raises ConfigError, CheckpointError, UnavailableError or TransportError."""
        keep_libraries_on(self._settings.host)
        set_threads(self._settings.threads)
        checkpoint = await asyncio.to_thread(Checkpoint.open, self._settings.model)
        site, membership = await self._join(checkpoint)
        group = await self._meet(site, membership)
        tensor_parallel = NoTensorParallel() if group is None else group.tensor_parallel
        load = gently(self._settings.load_niceness, load_weights)
        weights = await in_own_thread(load, checkpoint, site)
        terms = await self._settle_terms(site, group)
        links = await self._connect(site, membership)
        experts = make_experts(site, links, tensor_parallel)
        followers = self._followers
        rule = microbatch_rule(site, membership.state.tier(Role.EXPERT))
        observer = self._observer(site)
        kv = self._kv(site, membership, terms)
        duty = make_duty(site, weights, experts, group, followers, kv, rule, observer)
        if isinstance(duty, Leading):
            assert self._handover is not None
            self._handover.lead(duty.engine.sequences.parked.release)
            self._servicer.lead(duty.engine.sequences)
        else:
            epoch = terms.leader_instance_epoch
            self._servicer.follow(f"{site.group_rank} follows; ask its tp_rank 0", epoch)
        if followers is not None:
            await followers.all_connected(ARRIVAL_TIMEOUT_S)
        self._duty = duty
        self._upkeep = ClusterUpkeep(
            *(membership, links, site.placements, duty), self._host.set_ready, self._store_address
        )
        self._upkeep.report()

    async def serve(self) -> None:
        """Until the cluster or a rank of the group is lost, the leader has ended, or `drain` has
        nothing left to do but to close."""
        assert self._membership is not None
        assert self._duty is not None
        assert self._upkeep is not None
        self._served.clear()
        try:
            await until_first(
                self._duty.run(),
                self._membership.lost(),
                *self._upkeep.jobs(),
                _wait(self._closing),
            )
        finally:
            self._served.set()

    async def asked_to_leave(self) -> None:
        assert self._membership is not None
        await told_to_leave(self._membership, Role.ATTN)

    async def drain(self) -> None:
        if self._upkeep is not None:
            self._upkeep.drain()
        try:
            if self._duty is not None:
                await self._duty.drain()
        finally:
            await self._close()

    async def _close(self) -> None:
        """Also where the drain was cut short: whoever still waits for tokens is told why, as the
        engine's end says it."""
        await self._end_serving()
        if self._handover is not None:
            await self._handover.close()
        await self._host.stop(STOP_GRACE_S)
        if self._links is not None:
            await self._links.close()
        if self._endpoint is not None:
            self._endpoint.close()
        if self._membership is not None:
            await self._membership.close()
        if self._spans is not None:
            await self._spans.close()
        dissolve()

    async def _end_serving(self) -> None:
        """Whatever kept links and reports up would take what is closed next for lost."""
        self._closing.set()
        await self._served.wait()

    async def _join(self, checkpoint: Checkpoint) -> tuple[Site, Membership]:
        """Listen, and take a place in the cluster."""
        settings, model = self._settings, checkpoint.config
        fingerprint = await asyncio.to_thread(checkpoint.fingerprint)
        dtype = resolve_dtype(settings.dtype, model.dtype)
        self._host.add(add_to_server, self._servicer, SERVICE_NAME)
        port = await self._host.start(settings.host, settings.port)
        self._address = advertised_address(
            settings.host, port, settings.advertise_address, settings.gateway
        )
        join = Join(
            role=Role.ATTN,
            address=self._address,
            device=str(self._device),
            pid=os.getpid(),
            model_fingerprint=fingerprint,
            instance_epoch=new_instance_epoch(),
            dtype=str(dtype).removeprefix("torch."),
            host_id=host_id(),
            rank=settings.rank,
        )
        membership = await Membership.join(
            settings.gateway, join, timeout_s=JOIN_TIMEOUT_S, tls=self._tls
        )
        self._membership = membership
        bind_rank(membership.rank)
        site = Site(
            settings=settings,
            model=model,
            fingerprint=fingerprint,
            dtype=dtype,
            device=self._device,
            rank=membership.rank,
            instance_epoch=join.instance_epoch,
            parallel=membership.parallel.with_model(model),
            placements=Placements(membership.state.placement, self._device),
            tls=self._tls,
        )
        return site, membership

    def _observer(self, site: Site) -> EngineObserver | None:
        """Of this rank's steps, and of the engine where it has one, if it is to trace."""
        self._spans = open_spans(self._settings.otlp_traces_endpoint, self.name, site.rank)
        if self._spans is None:
            return None
        from attn_service.traces import EngineTraces

        return EngineTraces(self._spans, site.instance_epoch, site.group_rank)

    async def _meet(self, site: Site, membership: Membership) -> Group | None:
        if site.group_rank.tp_size == 1:
            return None
        group = await meet(
            membership,
            site.group_rank,
            split_address("advertise_address", self._address)[0],
            self._device,
            arrival_timeout_s=ARRIVAL_TIMEOUT_S,
            collective_timeout_s=self._collective_timeout_s,
        )
        self._store_address = group.store_address
        return group

    async def _settle_terms(self, site: Site, group: Group | None) -> GroupTerms:
        """How many KV blocks there are, now that the weights have taken their memory. On the
        leader, followers are accepted from then on."""
        settings = self._settings
        num_blocks = num_kv_blocks(settings, site.model, site.parallel, site.dtype, site.device)
        terms = GroupTerms(site.instance_epoch, num_blocks, settings.block_size)
        if group is not None:
            own = replace(terms, leader_instance_epoch=group.leader.instance_epoch)
            measured = settings.memory_utilization is not None
            offer = KvOffer(num_blocks, settings.block_size, measured)

            def accept(agreed: int) -> None:
                self._accept_followers(group.rank, replace(own, num_blocks=agreed))

            agreed = await agree(group.rank, group.store, offer, accept, ARRIVAL_TIMEOUT_S)
            terms = replace(own, num_blocks=agreed)
        log.info("KV cache", blocks=terms.num_blocks, block_size=terms.block_size)
        return terms

    def _kv(self, site: Site, membership: Membership, terms: GroupTerms) -> Kv:
        """The cache, and this rank's end of what is handed over from and to it."""

        def state() -> ClusterState:
            return membership.state

        cache = make_cache(site, terms)
        handover = make_handover(site, cache, self._options, self._endpoint, state)
        self._handover = handover
        self._servicer.hand_over(handover)
        fetcher = GroupKv(handover, site.group_rank, site.instance_epoch, state, site.tls)
        return Kv(terms, cache, fetcher)

    def _accept_followers(self, rank: GroupRank, terms: GroupTerms) -> None:
        self._followers = Followers(rank, terms, self._collective_timeout_s)
        self._servicer.accept(self._followers)

    async def _connect(self, site: Site, membership: Membership) -> ExpertLinks:
        """Links to the expert processes, once they are enough to serve with. Raises
        UnavailableError naming what is missing."""
        detail = "waiting for the expert processes"
        membership.report(MemberState.CONNECTING, detail=detail, store_address=self._store_address)
        self._endpoint, _ = open_endpoint(site.identity, self._options)
        self._links = links = make_links(site, self._options, self._endpoint)
        await connect_enough(membership, links, site.placements, ARRIVAL_TIMEOUT_S)
        return links

    @property
    def _collective_timeout_s(self) -> float:
        return self._settings.expert_wait_s + COLLECTIVE_MARGIN_S


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


def main(settings: AttnSettings) -> int:
    """Runs one attention process to its end and returns its exit status."""
    return run(AttentionProcess(settings), drain_timeout_s=settings.drain_timeout_s)
