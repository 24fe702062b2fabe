"""One rank of a layout, put together from the parts that the services are made of.

Knows how a checkpoint, a ParallelConfig and a rank become an expert's batcher or an attention
rank's model runner, and decodes greedily with it. Knows no process: rank_worker.py runs it in
one, and benchmarks or tests that want both tiers in one process call it directly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from attn_service.expert_client import ExpertClient
from attn_service.group_experts import GroupExperts
from attn_service.microbatches import MicrobatchRule
from attn_service.model_runner import ModelRunner
from attn_service.peers import Peers
from attn_service.placements import Placements
from attn_service.sequence import AskedLogprobs, SequenceSlice, StepPlan
from attn_service.step_runner import StepResult
from expert_service.batcher import Batcher
from expert_service.expert_runner import ExpertRunner
from moe_core.checkpoint.attention_loader import load_attention_weights
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.expert_loader import load_expert_weights
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.model.decoder import Decoder
from moe_core.model.kv_cache import KvCache
from moe_core.model.tensor_parallel import TensorParallel
from moe_core.placement import ExpertPlacement
from moe_core.transport.base import LinkSpec

BLOCK_SIZE = 4
# Smaller than the longest prompts of the suite, so that every layout sends chunks too.
SLOT_TOKENS = 32
SLOT_COUNT = 3
EXPERT_WAIT_S = 60.0


@dataclass(frozen=True)
class Layout:
    """What all ranks of one case share."""

    directory: Path
    parallel: ParallelConfig
    dtype: torch.dtype
    device: torch.device

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_hf(self.directory)

    @property
    def resolved(self) -> ParallelConfig:
        return self.parallel.with_model(self.config)

    @property
    def placement(self) -> ExpertPlacement:
        return ExpertPlacement.initial(self.config, self.resolved)

    @property
    def spec(self) -> LinkSpec:
        config = self.config
        assert config.moe is not None
        return LinkSpec(
            model_fingerprint=Checkpoint.open(self.directory).fingerprint(),
            dtype=self.dtype,
            hidden_size=config.hidden_size,
            num_columns=config.moe.num_experts_per_tok + self.resolved.shared_on_experts,
            slot_tokens=SLOT_TOKENS,
            slot_count=SLOT_COUNT,
        )


def build_batcher(layout: Layout, rank: int) -> Batcher:
    """The expert process `rank`'s weights behind its batcher."""
    parallel = layout.resolved
    ep_rank, etp_rank = parallel.expert_ranks(rank)
    weights = load_expert_weights(
        Checkpoint.open(layout.directory),
        placement=layout.placement,
        ep_rank=ep_rank,
        etp_rank=etp_rank,
        etp_size=parallel.etp_size,
        shared_expert=parallel.shared_on_experts,
        dtype=layout.dtype,
        device=layout.device,
    )
    return Batcher(ExpertRunner(weights, layout.placement, ep_rank, layout.device))


def build_runner(
    layout: Layout, tp: TensorParallel, peers: Peers, num_blocks: int
) -> tuple[ModelRunner, GroupExperts]:
    """An attention rank over its links to the expert processes."""
    config, parallel = layout.config, layout.resolved
    assert parallel.enable_mla is not None
    weights = load_attention_weights(
        Checkpoint.open(layout.directory),
        tp_rank=tp.rank,
        tp_size=tp.size,
        shared_expert=not parallel.shared_on_experts,
        dtype=layout.dtype,
        device=layout.device,
    )
    cache = KvCache.allocate(
        config, parallel.enable_mla, tp.size, num_blocks, BLOCK_SIZE, layout.dtype, layout.device
    )
    placements = Placements(layout.placement, layout.device)
    client = ExpertClient(peers, parallel, placements, tp, expert_wait_s=EXPERT_WAIT_S)
    experts = GroupExperts(client, tp)
    decoder = Decoder(config, weights, parallel.enable_mla, tp)
    return ModelRunner(decoder, cache, experts, layout.device), experts


@dataclass(frozen=True)
class Decoded:
    """Of one prompt: the logits of its last token, the logprobs of the others' next tokens, and the
    greedy continuation."""

    logits: list[float]
    prompt_logprobs: list[float]
    tokens: list[int]


class GreedyBatch:
    """Decodes prompts together: one step for all prompts, then one token each a step.

    A step of which a slice is lost is repeated after `repair`. lost_steps: how many were.
    """

    def __init__(
        self,
        runner: ModelRunner,
        experts: GroupExperts,
        num_microbatches: int = 1,
        repair: Callable[[], None] = lambda: None,
    ) -> None:
        self._runner = runner
        self._experts = experts
        self._rule = MicrobatchRule(num_microbatches)
        self._repair = repair
        self._step = 0
        self.lost_steps = 0

    async def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Decoded]:
        rows = [list(prompt) for prompt in prompts]
        tables = _block_tables([len(row) + num_tokens for row in rows])
        computed = [0] * len(rows)
        first: StepResult | None = None
        for _ in range(num_tokens):
            result = await self._run(rows, computed, tables)
            first = first or result
            logits = result.logits
            computed = [len(row) for row in rows]
            for row, token in zip(rows, logits.argmax(dim=-1).tolist(), strict=True):
                row.append(token)
        assert first is not None
        told = [[each.logprob for each in first.told.get(i, ())] for i in range(len(rows))]
        tokens = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
        all_decoded = zip(first.logits.tolist(), told, tokens, strict=True)
        return [Decoded(*each) for each in all_decoded]

    async def _run(
        self, rows: list[list[int]], computed: list[int], tables: list[tuple[int, ...]]
    ) -> StepResult:
        self._step += 1
        slices = tuple(
            SequenceSlice(
                tuple(row[done:]),
                done,
                table,
                needs_logits=True,
                asked_logprobs=AskedLogprobs(tuple(row[1:]), 1) if row[done + 1 :] else None,
            )
            for row, done, table in zip(rows, computed, tables, strict=True)
        )
        plan = StepPlan(self._step, 0, slices, self._rule.count(slices))
        result = await self._runner.execute(plan)
        if not self._experts.settle(result.lost, len(slices)):
            return result
        self.lost_steps += 1
        self._repair()
        return await self._run(rows, computed, tables)


def num_blocks(prompts: Sequence[Sequence[int]], num_tokens: int) -> int:
    return sum(-(-(len(prompt) + num_tokens) // BLOCK_SIZE) for prompt in prompts)


def _block_tables(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Blocks dealt out backwards, so that no test passes because block i holds tokens i·size…"""
    tables: list[tuple[int, ...]] = []
    used = 0
    for length in lengths:
        blocks = -(-length // BLOCK_SIZE)
        tables.append(tuple(reversed(range(used, used + blocks))))
        used += blocks
    return tables
