"""ModelConfig.from_hf: published and transformers-5 keys, and refusals that name the key."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from moe_core.config.model import GroupScore, ModelConfig, RouterScoring
from moe_core.errors import ConfigError
from support.published_configs import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    GLM_4_5,
    KIMI_K2,
    MIXTRAL_8X7B,
    PUBLISHED,
    QWEN3_30B_A3B,
)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_config_is_read(name: str) -> None:
    config = ModelConfig.from_hf(PUBLISHED[name])
    assert config.hidden_size == PUBLISHED[name]["hidden_size"]
    assert config.dtype == "bfloat16"


def test_deepseek_v3_sizes_and_router() -> None:
    config = ModelConfig.from_hf(DEEPSEEK_V3)
    assert config.mla is not None
    assert config.mla.latent_dim == 576
    assert (config.head_dim, config.v_head_dim, config.rotary_dim) == (192, 128, 64)
    assert config.moe_layer_ids == tuple(range(3, 61))
    assert config.moe.scoring is RouterScoring.SIGMOID
    assert config.moe.group_score is GroupScore.SUM_OF_TOP2
    assert config.moe.has_correction_bias
    assert config.rope.interleaved
    assert (config.rope.rope_type, config.rope.factor) == ("yarn", 40.0)
    assert config.quantization == "fp8_block_128"
    assert config.num_ignored_mtp_layers == 1


def test_kimi_k2_is_deepseek_v3_without_groups() -> None:
    config = ModelConfig.from_hf(KIMI_K2)
    assert config.model_type == "deepseek_v3"
    assert (config.moe.num_experts, config.moe.n_group) == (384, 1)


def test_deepseek_v2_greedy_has_no_groups_and_no_compressed_queries() -> None:
    config = ModelConfig.from_hf(DEEPSEEK_V2_LITE)
    assert config.mla is not None
    assert config.mla.q_lora_rank is None
    assert (config.moe.n_group, config.moe.topk_group) == (1, 1)
    assert config.moe.shared_intermediate_size == 2816


def test_glm_rotates_half_of_a_head_and_has_several_end_tokens() -> None:
    config = ModelConfig.from_hf(GLM_4_5)
    assert config.rotary_dim == 64
    assert config.eos_token_ids == (151329, 151336, 151338)
    assert config.attention_bias
    assert not config.o_proj_bias


def test_mixtral_experts_are_its_intermediate_size() -> None:
    config = ModelConfig.from_hf(MIXTRAL_8X7B)
    assert config.moe.moe_intermediate_size == 14336
    assert config.moe.scoring is RouterScoring.SOFTMAX_OVER_CHOSEN


def as_transformers_5_writes_it(published: Mapping[str, object]) -> dict[str, object]:
    config = dict(published)
    rope = dict(config.pop("rope_scaling", None) or {})  # type: ignore[call-overload]  # a dict
    rope["rope_type"] = rope.pop("type", "default")
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in config:
            rope[key] = config.pop(key)
    config["rope_parameters"] = rope
    config["dtype"] = config.pop("torch_dtype")
    return config


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_old_and_new_keys_read_the_same(name: str) -> None:
    published = PUBLISHED[name]
    assert ModelConfig.from_hf(as_transformers_5_writes_it(published)) == ModelConfig.from_hf(
        published
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"decoder_sparse_step": 2}, tuple(range(1, 48, 2))),
        ({"mlp_only_layers": [0, 47]}, tuple(range(1, 47))),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, tuple(range(5, 48, 3))),
    ],
)
def test_qwen_layers_with_experts(changes: Mapping[str, object], expected: tuple[int, ...]) -> None:
    assert ModelConfig.from_hf({**QWEN3_30B_A3B, **changes}).moe_layer_ids == expected


def test_deepseek_moe_layer_freq_skips_layers() -> None:
    config = ModelConfig.from_hf({**DEEPSEEK_V3, "moe_layer_freq": 2})
    assert config.moe_layer_ids == tuple(range(4, 61, 2))


def test_sliding_window_no_narrower_than_the_context_is_not_in_use() -> None:
    ModelConfig.from_hf({**MIXTRAL_8X7B, "sliding_window": 32768})
    ModelConfig.from_hf({**QWEN3_30B_A3B, "sliding_window": 4096})


_YARN = DEEPSEEK_V3["rope_scaling"]
assert isinstance(_YARN, dict)


@pytest.mark.parametrize(
    ("published", "changes", "named"),
    [
        (MIXTRAL_8X7B, {"model_type": "llama"}, "model_type"),
        (MIXTRAL_8X7B, {"model_type": None}, "model_type"),
        (MIXTRAL_8X7B, {"sliding_window": 4096}, "sliding_window"),
        (QWEN3_30B_A3B, {"sliding_window": 4096, "use_sliding_window": True}, "sliding_window"),
        (QWEN3_30B_A3B, {"hidden_act": "gelu"}, "hidden_act"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func"),
        (DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method"),
        (DEEPSEEK_V2_LITE, {"topk_method": "noaux_tc"}, "topk_method"),
        (DEEPSEEK_V2_LITE, {"topk_method": "group_limited_greedy", "n_group": None}, "n_group"),
        (DEEPSEEK_V2_LITE, {"norm_topk_prob": True}, "norm_topk_prob"),
        (DEEPSEEK_V2_LITE, {"rope_interleave": False}, "rope_interleave"),
        (DEEPSEEK_V2_LITE, {"mlp_bias": True}, "mlp_bias"),
        (MIXTRAL_8X7B, {"attention_bias": True}, "attention_bias"),
        (DEEPSEEK_V3, {"rope_scaling": {**_YARN, "type": "longrope"}}, "rope_scaling.type"),
        (DEEPSEEK_V3, {"rope_scaling": {**_YARN, "extra": 1}}, "rope_scaling.extra"),
        (DEEPSEEK_V3, {"rope_parameters": {"rope_type": "default"}}, "rope_scaling"),
        (QWEN3_30B_A3B, {"rope_scaling": {"type": "default", "factor": 2.0}}, "factor"),
        (QWEN3_30B_A3B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (GLM_4_5, {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        (DEEPSEEK_V3, {"quantization_config": {"quant_method": "gptq"}}, "quant_method"),
        (
            DEEPSEEK_V3,
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            "quantization_config.weight_block_size",
        ),
        (
            DEEPSEEK_V3,
            {"quantization_config": {**DEEPSEEK_V3["quantization_config"], "bits": 4}},  # type: ignore[dict-item]  # a dict
            "quantization_config.bits",
        ),
        (DEEPSEEK_V3, {"n_group": 7}, "n_group"),
        (DEEPSEEK_V3, {"topk_group": 9}, "topk_group"),
        (DEEPSEEK_V3, {"topk_group": 1, "num_experts_per_tok": 33}, "num_experts_per_tok"),
        (DEEPSEEK_V3, {"num_key_value_heads": 64}, "num_key_value_heads"),
        (QWEN3_30B_A3B, {"num_key_value_heads": 5}, "num_key_value_heads"),
        (DEEPSEEK_V3, {"head_dim": 128}, "head_dim"),
        (DEEPSEEK_V3, {"torch_dtype": "float8_e4m3fn"}, "dtype"),
        (DEEPSEEK_V3, {"dtype": "float32"}, "dtype"),
        (DEEPSEEK_V3, {"hidden_size": "7168"}, "hidden_size"),
        (DEEPSEEK_V3, {"hidden_size": 0}, "hidden_size"),
        (DEEPSEEK_V3, {"tie_word_embeddings": 1}, "tie_word_embeddings"),
        (QWEN3_30B_A3B, {"num_local_experts": 64}, "num_local_experts"),
        (QWEN3_30B_A3B, {"logit_softcap": 30.0}, "logit_softcap"),
    ],
)
def test_refusal_names_the_key(
    published: Mapping[str, object], changes: Mapping[str, object], named: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        ModelConfig.from_hf({**published, **changes})
    assert named in refused.value.setting


@pytest.mark.parametrize("key", ["q_lora_rank", "vocab_size", "rms_norm_eps", "n_group"])
def test_missing_key_is_refused_by_name(key: str) -> None:
    config = {name: value for name, value in DEEPSEEK_V3.items() if name != key}
    with pytest.raises(ConfigError) as refused:
        ModelConfig.from_hf(config)
    assert refused.value.setting == key


def test_directory_and_file_read_the_same_and_generation_config_names_the_end(
    tmp_path: Path,
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(QWEN3_30B_A3B))
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(QWEN3_30B_A3B)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [151645, 151643]}')
    assert ModelConfig.from_hf(tmp_path).eos_token_ids == (151645, 151643)
    assert ModelConfig.from_hf(str(file)).eos_token_ids == (151645,)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_unreadable_config_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_hf(tmp_path)


def test_missing_config_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_hf(tmp_path)


def test_fingerprint_fields_change_with_outputs_only() -> None:
    config = ModelConfig.from_hf(DEEPSEEK_V3)
    fields = json.dumps(config.fingerprint_fields())
    without_mtp = ModelConfig.from_hf({**DEEPSEEK_V3, "num_nextn_predict_layers": 0})
    assert json.dumps(without_mtp.fingerprint_fields()) == fields
    trained_otherwise = ModelConfig.from_hf({**DEEPSEEK_V3, "initializer_range": 1.0})
    assert json.dumps(trained_otherwise.fingerprint_fields()) == fields
    scaled = ModelConfig.from_hf({**DEEPSEEK_V3, "routed_scaling_factor": 2.0})
    assert json.dumps(scaled.fingerprint_fields()) != fields


@pytest.mark.parametrize(("tp_size", "kv_heads"), [(1, 4), (2, 2), (4, 1), (8, 1), (32, 1)])
def test_kv_heads_are_shared_out_then_replicated(tp_size: int, kv_heads: int) -> None:
    assert ModelConfig.from_hf(QWEN3_30B_A3B).local_kv_heads(tp_size) == kv_heads


def test_heads_that_tp_does_not_divide_are_refused() -> None:
    config = ModelConfig.from_hf(QWEN3_30B_A3B)
    with pytest.raises(ConfigError, match="num_attention_heads"):
        config.local_heads(64)
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        replace(config, num_key_value_heads=4).local_kv_heads(6)
