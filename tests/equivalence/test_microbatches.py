"""Attention TP groups compute a step in several micro-batches and give the tokens of one.

test_engine_traffic.py has the same for groups of one.
"""

import pytest

from moe_core.config.model import ModelConfig
from support.layouts import LAYOUTS
from support.rank_pool import RankPool
from support.tiny_checkpoints import Checkpoints

NUM_TOKENS = 24


@pytest.mark.parametrize(
    ("layout", "transport", "count"),
    [("dp1-tp2", "grpc", 3), ("dp1-tp2", "nixl", 2), ("colocated", "nixl", 3)],
)
def test_a_group_gives_the_tokens_of_one_micro_batch(
    checkpoints: Checkpoints, rank_pool: RankPool, layout: str, transport: str, count: int
) -> None:
    """Prompts of 1 to 40 tokens: a part may be one row, so that rank 1 has none of it."""
    directory, parallel = checkpoints.directory("deepseek_v3"), LAYOUTS[layout]
    references = checkpoints.references("deepseek_v3")
    answers = rank_pool.run(
        directory,
        parallel,
        transport,
        [[[reference.prompt for reference in references]]],
        NUM_TOKENS,
        dtype="float64",
        num_microbatches=count,
    )
    wanted = [list(reference.tokens[:NUM_TOKENS]) for reference in references]
    layers = len(ModelConfig.from_hf(directory).moe_layer_ids)
    for answer in answers:
        (decoded,) = answer["batches"]
        assert [one["tokens"] for one in decoded] == wanted
    # Rank 0 has rows of every part, and sends them to one process at least.
    dispatches = sum(link["dispatches"] for link in answers[0]["links"])
    assert dispatches >= count * NUM_TOKENS * layers
