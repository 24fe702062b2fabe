"""Fixtures that several kinds of tests share: tiny checkpoints with transformers' answers, and
the worker processes of the layout suite. Both are made when first asked for, once per session.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from support.rank_pool import RankPool
from support.tiny_checkpoints import Checkpoints

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # or the test processes would wait for each other's threads


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", help="where the layout suite puts both tiers, e.g. cuda"
    )
    parser.addoption("--soak", default="0", help="seconds of random faults in the soak test")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    base = tmp_path_factory.getbasetemp()
    # All of a session's test processes share one directory.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return Checkpoints(shared / "tiny-checkpoints")


@pytest.fixture(scope="session")
def rank_pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    pool = RankPool(request.config.getoption("--device"))
    yield pool
    pool.close()
