"""The demo's formulas against what the parts themselves say."""

from pathlib import Path

import pytest
import torch

from epserve.demo_report import (
    LevelResult,
    comparison_table,
    dispatch_bytes_per_layer,
    kv_bytes_per_token,
    links_between,
    processes_per_token,
)
from moe_core.cluster import LinkStats
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.model.kv_cache import bytes_per_token

TINY = Path(__file__).parents[2] / "epserve" / "tiny_model"


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return ModelConfig.from_hf(TINY)


def link(target: str, dispatch_bytes: int, dispatches: int = 1) -> LinkStats:
    return LinkStats("attn 0", target, "nixl", dispatches, dispatch_bytes, dispatch_bytes, 0, 0, 0)


def result(level: int, links: tuple[LinkStats, ...]) -> LevelResult:
    parallel = ParallelConfig(expert_devices=4, ep_size=4, expert_parallel_degree=level)
    return LevelResult(parallel, (1, 2), 10, 100.0, 16, 800.0, links)


@pytest.mark.parametrize("enable_mla", [True, False])
def test_kv_bytes_are_what_the_cache_allocates(model: ModelConfig, enable_mla: bool):
    assert kv_bytes_per_token(model, enable_mla) == bytes_per_token(
        model, enable_mla, 1, torch.bfloat16
    )


def test_links_between_two_readings_are_differences():
    before = (link("expert 0", 100, 3),)
    after = (link("expert 0", 250, 5), link("expert 1", 7, 1))
    grown = links_between(before, after)
    assert [(g.target, g.dispatch_bytes, g.dispatches) for g in grown] == [
        ("expert 0", 150, 2),
        ("expert 1", 7, 1),
    ]


def test_processes_per_token_come_from_the_counted_bytes(model: ModelConfig):
    layers = len(model.moe_layer_ids)
    everybody = round(dispatch_bytes_per_layer(10, 4, model)) * layers
    assert processes_per_token(result(1, (link("expert 0", everybody),)), model) == 4.0
    assert processes_per_token(result(2, (link("expert 0", everybody // 2),)), model) == 2.0


def test_the_table_has_a_column_per_level_with_counted_and_predicted_bytes(model: ModelConfig):
    counted = 10 * 4 * 160 * 2
    layers = len(model.moe_layer_ids)
    links = (link("expert 0", counted * layers),)
    table = comparison_table([result(1, links), result(2, links)], model)
    assert [column.header for column in table.columns] == ["", "Level 1", "Level 2"]
    level_1 = list(table.columns[1].cells)
    assert level_1[1:4] == ["12,800", "12,800", "12,800"]
    assert list(table.columns[2].cells)[2] == "at most 6,400"
