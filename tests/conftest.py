"""Fixtures that several kinds of tests share: tiny checkpoints with transformers' answers, and
the worker processes of the layout suite. Both are made when first asked for, once per session.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.rank_pool import RankPool
from support.tiny_checkpoints import Reference, prompts, references, tiny_checkpoint

from moe_core.config.model import ModelConfig


@dataclass
class Checkpoints:
    """The tiny checkpoints below `root`, in float32, and what transformers computes for the
    fixed prompts."""

    root: Path
    _references: dict[str, list[Reference]] = field(default_factory=dict)

    def directory(self, name: str) -> Path:
        return tiny_checkpoint(name, self.root)

    def references(self, name: str) -> list[Reference]:
        if name not in self._references:
            directory = self.directory(name)
            vocab_size = ModelConfig.from_hf(directory).vocab_size
            self._references[name] = references(directory, prompts(vocab_size))
        return self._references[name]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    base = tmp_path_factory.getbasetemp()
    # All of a session's test processes share one directory.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return Checkpoints(shared / "tiny-checkpoints")


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()
