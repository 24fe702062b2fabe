"""Decode is one computation for all sequences: as many operators for many as for two."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.model.batch import AttentionBatch, SequenceSlice
from moe_core.model.decoder import Decoder
from moe_core.model.kv_cache import KvCache
from moe_core.model.tensor_parallel import NoTensorParallel
from support.checkpoint_files import CPU, load_attention
from support.tiny_checkpoints import Checkpoints


class Operators(TorchDispatchMode):
    """Counts what torch is asked to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:  # noqa: ANN001, ANN401
        self.counted[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operators(directory: Path, enable_mla: bool, num_sequences: int) -> Counter[str]:
    """Of one layer's attention, each sequence with a past of its own length."""
    checkpoint = Checkpoint.open(directory)
    tp = NoTensorParallel()
    decoder = Decoder(checkpoint.config, load_attention(checkpoint), enable_mla, tp)
    cache = KvCache.allocate(
        checkpoint.config, enable_mla, 1, 3 * num_sequences, 4, torch.float32, CPU
    )
    slices = [SequenceSlice((3 * i, 3 * i + 1, 3 * i + 2), 1 + i, 1) for i in range(num_sequences)]
    batch = AttentionBatch.build(slices, 4, CPU)
    hidden = decoder.embed(torch.arange(num_sequences))
    with torch.no_grad(), Operators() as seen:
        decoder.layers[0].attend(hidden, batch, cache)
    return seen.counted


@pytest.mark.parametrize(
    ("name", "enable_mla"),
    [("deepseek_v3", True), ("deepseek_v3", False), ("qwen3_moe-norm", False)],
)
def test_many_sequences_take_as_many_operators_as_two(
    checkpoints: Checkpoints, name: str, enable_mla: bool
) -> None:
    directory = checkpoints.directory(name)
    two, many = (operators(directory, enable_mla, count) for count in (2, 9))
    assert two == many
    assert sum(two.values()) > 10
