from dataclasses import replace
from pathlib import Path

import pytest

from attn_service.settings import AttnSettings
from moe_core.errors import ConfigError
from support.moe_configs import deepseek_v3_model

SETTINGS = AttnSettings(gateway="127.0.0.1:1", model=Path("model"))


def test_the_default_cache_holds_all_contexts_where_they_are_short() -> None:
    model = replace(deepseek_v3_model(), max_position_embeddings=100)
    assert replace(SETTINGS, max_num_seqs=8).num_kv_blocks(model) == 8 * 100 // 16


def test_the_default_cache_is_bounded_where_contexts_are_long() -> None:
    model = replace(deepseek_v3_model(), max_position_embeddings=163_840)
    assert SETTINGS.num_kv_blocks(model) == 65_536 // 16


def test_kv_cache_tokens_are_rounded_down_to_whole_blocks() -> None:
    assert replace(SETTINGS, kv_cache_tokens=100).num_kv_blocks(deepseek_v3_model()) == 6


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("block_size", 0),
        ("kv_cache_tokens", 15),
        ("expert_wait_s", 0.0),
        ("hedge_after_s", 31.0),
        ("orphan_grace_s", -0.5),
        ("microbatches", "4"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{setting.removesuffix('_s')}="):
        replace(SETTINGS, **{setting: value})
