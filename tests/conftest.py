"""Fixtures that more than one suite uses."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.rank_pool import RankPool
from support.tiny_checkpoints import Reference, prompts, references, tiny_checkpoint

from moe_core.config.model import ModelConfig


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", help="where the equality suite puts both tiers, e.g. cuda"
    )


class Checkpoints:
    """Tiny checkpoints and what transformers makes of them, each made once a session."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._references: dict[str, Sequence[Reference]] = {}

    def directory(self, name: str) -> Path:
        return tiny_checkpoint(name, self._root)

    def references(self, name: str) -> Sequence[Reference]:
        """Of prompts of mixed lengths, 64 greedy tokens each."""
        if name not in self._references:
            directory = self.directory(name)
            vocab_size = ModelConfig.from_hf(directory).vocab_size
            self._references[name] = references(directory, prompts(vocab_size))
        return self._references[name]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def rank_pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    pool = RankPool(request.config.getoption("--device"))
    yield pool
    pool.close()
