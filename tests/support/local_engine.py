"""The real engine over a checkpoint, both tiers in this process and `local` links between them.

Knows how the services put their parts together, without gRPC and without a cluster. The
attention tier is one process (attn_devices 1); the expert tier is whatever ParallelConfig says.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from attn_service.assembly import Kv, Site, make_cache, make_duty
from attn_service.duties import Leading
from attn_service.engine import Engine
from attn_service.engine_stream import EngineStream
from attn_service.expert_client import ExpertClient
from attn_service.follow import GroupTerms
from attn_service.microbatches import MicrobatchRule
from attn_service.peers import Peers
from attn_service.placements import Placements
from attn_service.sequence import SequenceRequest
from attn_service.settings import AttnSettings
from expert_service.batcher import Batcher
from expert_service.expert_runner import ExpertRunner
from moe_core.checkpoint.attention_loader import load_attention_weights
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.expert_loader import load_expert_weights
from moe_core.config.expert_wait import DEFAULT_EXPERT_WAIT_S
from moe_core.config.parallel import ParallelConfig
from moe_core.exchange import link_spec
from moe_core.model.fastest_form import fastest_form
from moe_core.model.tensor_parallel import NoTensorParallel
from moe_core.placement import ExpertPlacement
from moe_core.transport.local import LocalLink

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Generated:
    token_ids: tuple[int, ...]
    finish_reason: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """`links`, by expert rank, count what crossed and can be closed to play a lost process.
    `make_link` plays a process that has come back; `peers` are who the engine asks."""

    engine: Engine
    links: tuple[LocalLink, ...]
    peers: Peers
    make_link: Callable[[int, type[LocalLink]], LocalLink]

    async def generate(self, requests: Iterable[SequenceRequest]) -> dict[str, Generated]:
        """All requests at once; the results by sequence id."""
        stream = self.engine.sequences.open_stream()
        for request in requests:
            stream.add(request)
        stream.end_of_requests()
        return await collect(stream)


async def collect(stream: EngineStream) -> dict[str, Generated]:
    """Everything that a stream puts out until it ends."""
    results: dict[str, Generated] = {}
    async for step in stream.outputs():
        for output in step.outputs:
            before = results.get(output.sequence_id, Generated((), ""))
            results[output.sequence_id] = Generated(
                before.token_ids + output.token_ids, output.finish_reason or "", output.error
            )
    return results


@asynccontextmanager
async def local_engine(
    directory: Path,
    parallel: ParallelConfig,
    *,
    dtype: torch.dtype,
    kv_cache_tokens: int | None = None,
    block_size: int = 16,
    max_num_seqs: int = 16,
    max_step_tokens: int = 64,
    microbatches: str = "1",
    device: torch.device = CPU,
    expert_wait_s: float = DEFAULT_EXPERT_WAIT_S,
    hedge_after_s: float | None = None,
) -> AsyncIterator[LocalEngine]:
    """A running engine; it is stopped on the way out."""
    checkpoint = Checkpoint.open(directory)
    settings = AttnSettings(
        gateway="",
        model=directory,
        kv_cache_tokens=kv_cache_tokens,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_step_tokens=max_step_tokens,
        expert_wait_s=expert_wait_s,
        hedge_after_s=hedge_after_s,
    )
    parallel = parallel.with_model(checkpoint.config)
    site = Site(
        settings=settings,
        model=checkpoint.config,
        fingerprint="local",
        dtype=dtype,
        device=device,
        rank=0,
        instance_epoch=1,
        parallel=parallel,
        placements=Placements(ExpertPlacement.initial(checkpoint.config, parallel), device),
    )
    make_link = _link_maker(checkpoint, site)
    links = tuple(make_link(rank, LocalLink) for rank in range(parallel.expert_devices))
    peers = Peers(parallel.etp_size, links)
    terms = GroupTerms(1, settings.num_kv_blocks(checkpoint.config), settings.block_size)
    weights = _weights(checkpoint, site)
    rule = MicrobatchRule.of(microbatches, site.model, parallel, shares_device=True)
    kv = Kv(terms, make_cache(site, terms))
    duty = make_duty(site, weights, _experts(site, peers), None, None, kv, rule)
    assert isinstance(duty, Leading)
    running = asyncio.create_task(duty.run())
    try:
        yield LocalEngine(duty.engine, links, peers, make_link)
    finally:
        running.cancel()
        await asyncio.wait({running})
        for link in (*links, *peers.links.values()):
            await link.close()
    if not running.cancelled():
        running.result()


def _weights(checkpoint: Checkpoint, site: Site):
    return load_attention_weights(
        checkpoint,
        tp_rank=0,
        tp_size=1,
        shared_expert=not site.parallel.shared_on_experts,
        dtype=site.dtype,
        device=site.device,
        form=fastest_form(site.dtype, site.device),
    )


def _experts(site: Site, peers: Peers) -> ExpertClient:
    return ExpertClient(
        peers,
        site.parallel,
        site.placements,
        NoTensorParallel(),
        expert_wait_s=site.settings.expert_wait_s,
        hedge_after_s=site.settings.hedge_after_s,
    )


def _link_maker(checkpoint: Checkpoint, site: Site) -> Callable[[int, type[LocalLink]], LocalLink]:
    """What links to a process of some rank; each process loads its weights once."""
    batchers: dict[int, Batcher] = {}
    spec = link_spec(
        site.model, site.parallel, model_fingerprint="local", dtype=site.dtype, spare_slots=2
    )

    def make(rank: int, kind: type[LocalLink]) -> LocalLink:
        if rank not in batchers:
            batchers[rank] = _batcher(checkpoint, site, rank)
        return kind(batchers[rank].submit, spec, peer=f"expert {rank} (local)")

    return make


def _batcher(checkpoint: Checkpoint, site: Site, rank: int) -> Batcher:
    parallel, placement = site.parallel, site.placements.newest
    ep_rank, etp_rank = parallel.expert_ranks(rank)
    weights = load_expert_weights(
        checkpoint,
        placement=placement,
        ep_rank=ep_rank,
        etp_rank=etp_rank,
        etp_size=parallel.etp_size,
        shared_expert=parallel.shared_on_experts,
        dtype=site.dtype,
        device=site.device,
        form=fastest_form(site.dtype, site.device),
    )
    return Batcher(ExpertRunner(weights, placement, ep_rank, site.device))
