"""The layouts of the equality suite, and what a case of it checks.

Knows layouts, transports and the tolerance in float32. Knows neither processes (rank_pool.py)
nor how transformers is run (tiny_checkpoints.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from support.rank_pool import Batch, RankPool
from support.tiny_cases import CASES
from support.tiny_checkpoints import Reference

TRANSPORTS = ("local", "grpc", "nixl")
# Of the last prompt token's logits, in float32.
LOGITS_TOLERANCE = 1e-4
NUM_TOKENS = 64

LAYOUTS: Mapping[str, ParallelConfig] = {
    "1+1": ParallelConfig(),
    "dp2-per-head-cache": ParallelConfig(attn_devices=2, dp_size=2, enable_mla=False),
    "dp1-tp2": ParallelConfig(attn_devices=2),
    "ep1-etp2-level0": ParallelConfig(expert_devices=2),
    "ep2-etp2-level1": ParallelConfig(expert_devices=4, ep_size=2),
    "ep4-level2": ParallelConfig(expert_devices=4, ep_size=4, expert_parallel_degree=2),
    "ep4-level2-redundant-shared": ParallelConfig(
        expert_devices=4,
        ep_size=4,
        expert_parallel_degree=2,
        num_redundant_experts=4,
        shared_experts="expert",
    ),
    "colocated": ParallelConfig(
        attn_devices=2, expert_devices=2, ep_size=2, expert_parallel_degree=2, colocated=True
    ),
}


@dataclass(frozen=True)
class Case:
    checkpoint: str
    layout: str
    transport: str

    def __str__(self) -> str:
        return f"{self.checkpoint}/{self.layout}/{self.transport}"

    @property
    def possible(self) -> bool:
        """`local` is one process, so it has no attention TP group."""
        return self.transport != "local" or LAYOUTS[self.layout].tp_size == 1

    def parallel(self, directory: Path) -> ParallelConfig:
        """A model without shared experts has none to put on the expert tier."""
        config = LAYOUTS[self.layout]
        moe = ModelConfig.from_hf(directory).moe
        if moe is None or moe.n_shared_experts:
            return config
        return replace(config, shared_experts="attention")


def full_product() -> Iterator[Case]:
    for checkpoint in CASES:
        for layout in LAYOUTS:
            cases = (Case(checkpoint, layout, transport) for transport in TRANSPORTS)
            yield from (case for case in cases if case.possible)


def pairwise_cover() -> Iterator[Case]:
    """Every checkpoint with every layout, and both with every transport that is possible."""
    for row, checkpoint in enumerate(CASES):
        for column, layout in enumerate(LAYOUTS):
            cases = (Case(checkpoint, layout, transport) for transport in TRANSPORTS)
            possible = [case for case in cases if case.possible]
            yield possible[(row + column) % len(possible)]


def check(case: Case, directory: Path, references: Sequence[Reference], pool: RankPool) -> None:
    """Decode alone and in batches of mixed lengths; everything must be transformers'."""
    parallel = case.parallel(directory)
    work = _work(parallel.dp_size, references)
    batches: list[list[Batch]] = [
        [[reference.prompt for reference in batch] for batch in group] for group in work
    ]
    answers = pool.run(directory, parallel, case.transport, batches, NUM_TOKENS)
    for rank, answer in enumerate(answers):
        for link in answer["links"]:
            assert link["transport"] == case.transport
            assert link["stream_tensor_bytes"] == 0 or case.transport == "grpc"
        expected = work[parallel.attention_ranks(rank)[0]]
        for batch, decoded in zip(expected, answer["batches"], strict=True):
            for reference, one in zip(batch, decoded, strict=True):
                _compare(reference.logits.tolist(), one["logits"])
                _compare(reference.told, one["prompt_logprobs"])
                assert tuple(one["tokens"]) == reference.tokens


def _work(dp_size: int, references: Sequence[Reference]) -> list[list[Sequence[Reference]]]:
    """Per DP group: one prompt alone, then its share of the prompts as one batch."""
    shares = [references[rank::dp_size] for rank in range(dp_size)]
    return [[share[-1:], share] for share in shares]


def _compare(expected: Sequence[float], logits: Sequence[float]) -> None:
    worst = max((abs(a - b) for a, b in zip(expected, logits, strict=True)), default=0.0)
    assert worst <= LOGITS_TOLERANCE, f"logits differ by {worst}"
