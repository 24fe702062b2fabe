"""The full product of checkpoints, layouts and transports; tests/equivalence has a cover."""

import pytest
from support.layouts import Case, check, full_product


@pytest.mark.parametrize("case", tuple(full_product()), ids=str)
def test_layout_gives_the_tokens_of_transformers(case: Case, checkpoints, rank_pool) -> None:
    check(
        case,
        checkpoints.directory(case.checkpoint),
        checkpoints.references(case.checkpoint),
        rank_pool,
    )
