"""The full product of checkpoints, layouts and transports; tests/equivalence has a cover."""

import pytest

from support.layouts import Case, check, full_product
from support.rank_pool import RankPool
from support.tiny_checkpoints import Checkpoints


@pytest.mark.parametrize("case", tuple(full_product()), ids=str)
def test_layout_gives_the_tokens_of_transformers(
    case: Case, checkpoints: Checkpoints, rank_pool: RankPool
) -> None:
    check(
        case,
        checkpoints.directory(case.checkpoint),
        checkpoints.references(case.checkpoint),
        rank_pool,
    )
