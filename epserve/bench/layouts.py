"""Clusters that rows have in common, as the options that `epserve serve` starts them with."""

from epserve.bench.row import BenchSettings
from moe_core.checkpoint.checkpoint import Checkpoint

TWO_HALVES = ("--expert-devices", "2", "--ep-size", "2")
TWO_GROUPS = ("--attn-devices", "2", "--dp-size", "2")


def replicated(settings: BenchSettings) -> tuple[str, ...]:
    """Two expert processes, each of which holds every expert."""
    return (*TWO_HALVES, "--num-redundant-experts", str(num_experts(settings)))


def num_experts(settings: BenchSettings) -> int:
    return Checkpoint.open(settings.model).config.moe.num_experts
