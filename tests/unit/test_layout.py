"""The derived layout: ranks, experts and devices of every process."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from epserve.layout import derive_layout, describe, experts_held, layout_table, spread_devices
from moe_core.cluster import Role
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig

TINY = Path(__file__).parents[2] / "epserve" / "tiny_model"


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return ModelConfig.from_hf(TINY)


def test_ranks_of_both_tiers_follow_the_configuration(model: ModelConfig):
    parallel = ParallelConfig(attn_devices=4, dp_size=2, expert_devices=4, ep_size=2)
    places = derive_layout(
        parallel.with_model(model), model, ["cpu"] * 4, ["cpu"] * 4, (50051, 8000)
    )
    assert [place.name for place in places] == [
        "gateway",
        *(f"attn {rank}" for rank in range(4)),
        *(f"expert {rank}" for rank in range(4)),
    ]
    attn = [place for place in places if place.role is Role.ATTN]
    assert [(place.dp_rank, place.tp_rank) for place in attn] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    expert = [place for place in places if place.role is Role.EXPERT]
    assert [(place.ep_rank, place.etp_rank) for place in expert] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(place.ep_rank is None for place in attn)


def test_experts_held_are_routed_redundant_and_shared(model: ModelConfig):
    parallel = ParallelConfig(
        expert_devices=4, ep_size=4, num_redundant_experts=4, shared_experts="expert"
    )
    held = experts_held(parallel.with_model(model), model)
    assert [str(process) for process in held] == ["4+1+1"] * 4


def test_an_uneven_number_of_copies_leaves_some_processes_with_one_fewer(model: ModelConfig):
    parallel = ParallelConfig(expert_devices=4, ep_size=4, num_redundant_experts=3)
    held = experts_held(parallel.with_model(model), model)
    assert sum(process.routed for process in held) == 16
    assert sum(process.redundant for process in held) == 3
    assert {process.routed + process.redundant for process in held} == {4, 5}


@pytest.mark.parametrize(
    ("colocated", "num_devices", "attn", "expert"),
    [
        (False, 0, ["cpu", "cpu"], ["cpu", "cpu"]),
        (False, 4, ["cuda:0", "cuda:1"], ["cuda:2", "cuda:3"]),
        (True, 4, ["cuda:0", "cuda:1"], ["cuda:0", "cuda:1"]),
        (False, 1, ["cuda:0", "cuda:0"], ["cuda:0", "cuda:0"]),
    ],
)
def test_ranks_are_spread_over_the_devices(
    colocated: bool, num_devices: int, attn: list[str], expert: list[str]
):
    parallel = ParallelConfig(attn_devices=2, dp_size=2, expert_devices=2, colocated=colocated)
    assert spread_devices(parallel, num_devices) == (tuple(attn), tuple(expert))


def test_the_table_names_every_process_and_fits_eighty_columns(model: ModelConfig):
    parallel = ParallelConfig(expert_devices=2, ep_size=2).with_model(model)
    places = derive_layout(parallel, model, ["cpu"], ["cpu", "cpu"], (50051, 8000))
    console = Console(file=io.StringIO(), width=80)
    console.print(layout_table(places))
    text = console.file.getvalue()
    for words in ("gateway", "attn 0", "expert 1", "8+0+0", "50051, HTTP 8000", "any"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_description_names_level_and_sizes(model: ModelConfig):
    parallel = ParallelConfig(expert_devices=2, ep_size=2, expert_parallel_degree=2)
    words = describe(parallel.with_model(model), model)
    assert "deepseek_v3" in words
    assert "dp 1 × tp 1" in words
    assert "Level 2" in words
