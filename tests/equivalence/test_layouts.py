"""Both tiers over layouts, levels and transports give transformers' logits and tokens.

A pairwise cover here; tests/system runs the full product.
"""

import pytest

from support.layouts import Case, check, pairwise_cover
from support.rank_pool import RankPool
from support.tiny_checkpoints import Checkpoints


@pytest.mark.parametrize("case", tuple(pairwise_cover()), ids=str)
def test_layout_gives_the_tokens_of_transformers(
    case: Case, checkpoints: Checkpoints, rank_pool: RankPool
) -> None:
    check(
        case,
        checkpoints.directory(case.checkpoint),
        checkpoints.references(case.checkpoint),
        rank_pool,
    )
