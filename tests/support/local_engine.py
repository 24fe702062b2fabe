"""The real engine over a checkpoint, both tiers in this process and `local` links between them.

Knows how the services put their parts together, without gRPC and without a cluster. The
attention tier is one process (attn_devices 1); the expert tier is whatever ParallelConfig says.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from attn_service.assembly import Site, make_duty
from attn_service.duties import Leading
from attn_service.engine import Engine
from attn_service.engine_stream import EngineStream
from attn_service.expert_client import ExpertClient
from attn_service.follow import GroupTerms
from attn_service.microbatches import MicrobatchRule
from attn_service.placements import Placements
from attn_service.sequence import SequenceRequest
from attn_service.settings import AttnSettings
from expert_service.batcher import Batcher
from expert_service.expert_runner import ExpertRunner
from moe_core.checkpoint.attention_loader import load_attention_weights
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.expert_loader import load_expert_weights
from moe_core.config.parallel import ParallelConfig
from moe_core.exchange import link_spec
from moe_core.model.linear import packing_pays
from moe_core.model.tensor_parallel import NoTensorParallel
from moe_core.placement import ExpertPlacement
from moe_core.transport.local import LocalLink

CPU = torch.device("cpu")
EXPERT_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Generated:
    token_ids: tuple[int, ...]
    finish_reason: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """`links`, by expert rank, count what crossed and can be closed to play a lost process."""

    engine: Engine
    links: tuple[LocalLink, ...]

    async def generate(self, requests: Iterable[SequenceRequest]) -> dict[str, Generated]:
        """All requests at once; the results by sequence id."""
        stream = self.engine.open_stream()
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
    links = tuple(_link(checkpoint, site, rank) for rank in range(parallel.expert_devices))
    terms = GroupTerms(1, settings.num_kv_blocks(checkpoint.config), settings.block_size)
    weights = _weights(checkpoint, site)
    rule = MicrobatchRule.of(microbatches, site.model, parallel, shares_device=True)
    duty = make_duty(site, weights, _experts(site, links), None, None, terms, rule)
    assert isinstance(duty, Leading)
    running = asyncio.create_task(duty.run())
    try:
        yield LocalEngine(duty.engine, links)
    finally:
        running.cancel()
        await asyncio.wait({running})
        for link in links:
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
        packed=packing_pays(site.dtype, site.device),
    )


def _experts(site: Site, links: tuple[LocalLink, ...]) -> ExpertClient:
    return ExpertClient(
        links,
        site.parallel,
        site.placements,
        NoTensorParallel(),
        expert_wait_s=EXPERT_WAIT_S,
    )


def _link(checkpoint: Checkpoint, site: Site, rank: int) -> LocalLink:
    parallel = site.parallel
    ep_rank, etp_rank = parallel.expert_ranks(rank)
    weights = load_expert_weights(
        checkpoint,
        placement=site.placements.newest,
        ep_rank=ep_rank,
        etp_rank=etp_rank,
        etp_size=parallel.etp_size,
        shared_expert=parallel.shared_on_experts,
        dtype=site.dtype,
        device=site.device,
        packed=packing_pays(site.dtype, site.device),
    )
    spec = link_spec(
        site.model, parallel, model_fingerprint="local", dtype=site.dtype, spare_slots=2
    )
    batcher = Batcher(ExpertRunner(weights, site.placements.newest, ep_rank, site.device))
    return LocalLink(batcher.submit, spec, peer=f"expert {rank} (local)")
