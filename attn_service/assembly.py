"""How the parts of an attention process are put together.

Knows every part's constructor, and what one process is (`Site`). Knows no order of events and
nothing that waits; process.py does.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from attn_service.adoptions import KvFetcher
from attn_service.duties import Duty, Following, Leading
from attn_service.engine import Engine
from attn_service.expert_client import ExpertClient
from attn_service.expert_counts import CountedExperts
from attn_service.expert_links import ExpertLinks
from attn_service.experts import Experts
from attn_service.follow import Followers, GroupTerms
from attn_service.group_experts import GroupExperts, GroupRunner
from attn_service.kv_blocks import BlockPool
from attn_service.kv_handover import KvHandover
from attn_service.microbatches import MicrobatchRule
from attn_service.model_runner import ModelRunner
from attn_service.placed_runner import PlacedRunner
from attn_service.placements import Placements
from attn_service.rendezvous import Group
from attn_service.settings import AttnSettings
from attn_service.step_runner import EngineObserver, StepRunner
from attn_service.tensor_parallel import GroupRank
from moe_core.cluster import ClusterState, Member
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.exchange import link_spec
from moe_core.model.decoder import Decoder
from moe_core.model.kv_cache import KvCache
from moe_core.model.tensor_parallel import NoTensorParallel, TensorParallel
from moe_core.model.weights import AttentionTierWeights
from moe_core.service.addresses import host_id
from moe_core.service.certificates import Certificates
from moe_core.transport.base import ANY_WORLD, ExpertLink, Identity, TransportOptions
from moe_core.transport.connect import connect_link
from moe_core.transport.endpoint import NixlEndpoint


@dataclass(frozen=True, slots=True)
class Site:
    """One attention process: its settings, its place in the cluster and its model.

    rank is its rank in the tier, group_rank its place in its TP group; tls is what it shows of
    itself to other processes (None: nothing, in the clear).
    """

    settings: AttnSettings
    model: ModelConfig
    fingerprint: str
    dtype: torch.dtype
    device: torch.device
    rank: int
    instance_epoch: int
    parallel: ParallelConfig
    placements: Placements
    tls: Certificates | None = None

    @property
    def group_rank(self) -> GroupRank:
        return GroupRank(*self.parallel.attention_ranks(self.rank), self.parallel.tp_size)

    @property
    def identity(self) -> Identity:
        return Identity(self.rank, self.parallel.attn_devices, self.instance_epoch)


def make_links(site: Site, options: TransportOptions, endpoint: NixlEndpoint | None) -> ExpertLinks:
    """Links to all expert processes, over one `endpoint` (None: grpc); none is connected yet."""
    if endpoint is None:
        options = replace(options, transport="grpc")
    spec = link_spec(
        site.model,
        site.parallel,
        model_fingerprint=site.fingerprint,
        dtype=site.dtype,
        spare_slots=options.spare_slots,
    )

    async def connect(member: Member) -> ExpertLink:
        peer = Identity(member.rank, ANY_WORLD, member.instance_epoch)
        return await connect_link(
            member.address, spec, site.identity, peer, options, endpoint, site.tls
        )

    return ExpertLinks(site.parallel.etp_size, connect)


def make_experts(site: Site, links: ExpertLinks, tensor_parallel: TensorParallel) -> Experts:
    return ExpertClient(
        links.peers,
        site.parallel,
        site.placements,
        tensor_parallel,
        expert_wait_s=site.settings.expert_wait_s,
        hedge_after_s=site.settings.hedge_after_s,
        turn_offset=site.group_rank.dp_rank,
    )


@dataclass(frozen=True, slots=True)
class Kv:
    """terms are the group's, or a single process's own; fetcher is for whoever leads."""

    terms: GroupTerms
    cache: KvCache
    fetcher: KvFetcher | None = None


def make_cache(site: Site, terms: GroupTerms) -> KvCache:
    return KvCache.allocate(
        site.model,
        bool(site.parallel.enable_mla),
        site.parallel.tp_size,
        terms.num_blocks,
        terms.block_size,
        site.dtype,
        site.device,
    )


def make_handover(
    site: Site,
    cache: KvCache,
    options: TransportOptions,
    endpoint: NixlEndpoint | None,
    state: Callable[[], ClusterState],
) -> KvHandover:
    return KvHandover(
        cache,
        site.fingerprint,
        site.identity,
        site.group_rank,
        options,
        endpoint,
        site.tls,
        state,
    )


def make_duty(
    site: Site,
    weights: AttentionTierWeights,
    experts: Experts,
    group: Group | None,
    followers: Followers | None,
    kv: Kv,
    microbatches: MicrobatchRule,
    observer: EngineObserver | None = None,
) -> Duty:
    """This rank's work. `group` is None in a group of one, `followers` on all ranks but 0;
    `microbatches` is for whoever leads."""

    def placed(runner: StepRunner) -> PlacedRunner:
        return PlacedRunner(runner, site.placements)

    if group is None:
        counted = CountedExperts(experts, site.model, site.device)
        single = placed(_model_runner(site, weights, counted, NoTensorParallel(), kv.cache))
        return Leading(_engine(site, single, kv, microbatches, observer), None, counted)
    group_experts = GroupExperts(experts, group.tensor_parallel)
    if followers is not None:
        counted = CountedExperts(group_experts, site.model, site.device)
        runner = _model_runner(site, weights, counted, group.tensor_parallel, kv.cache)
        # Around the whole group's step: it is under way from when its plan is sent.
        leading = placed(GroupRunner(runner, group_experts, followers.publish))
        engine = _engine(site, leading, kv, microbatches, observer)
        return Leading(engine, followers, counted)
    runner = _model_runner(site, weights, group_experts, group.tensor_parallel, kv.cache)
    following = GroupRunner(placed(runner), group_experts, None, observer)
    return Following(group.leader.address, group.rank, kv.terms, following, site.tls)


def microbatch_rule(site: Site, experts: Iterable[Member]) -> MicrobatchRule:
    """For steps whose experts are computed by `experts`."""
    here = (host_id(), str(site.device))
    return MicrobatchRule.of(
        site.settings.microbatches,
        site.model,
        site.parallel,
        shares_device=here in ((member.host_id, member.device) for member in experts),
    )


def _model_runner(
    site: Site,
    weights: AttentionTierWeights,
    experts: Experts,
    tensor_parallel: TensorParallel,
    cache: KvCache,
) -> ModelRunner:
    decoder = Decoder(site.model, weights, bool(site.parallel.enable_mla), tensor_parallel)
    return ModelRunner(decoder, cache, experts, site.device)


def _engine(
    site: Site,
    runner: PlacedRunner,
    kv: Kv,
    microbatches: MicrobatchRule,
    observer: EngineObserver | None,
) -> Engine:
    return Engine(
        runner,
        BlockPool(kv.terms.num_blocks, kv.terms.block_size),
        site.settings.scheduler_config(site.model),
        vocab_size=site.model.vocab_size,
        placement_epoch=lambda: site.placements.newest.epoch,
        expert_wait_s=site.settings.expert_wait_s,
        microbatches=microbatches,
        observer=observer,
        orphan_grace_s=site.settings.orphan_grace_s,
        kv_fetcher=kv.fetcher,
    )
