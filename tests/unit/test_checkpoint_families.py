"""Loaded weights against transformers' own, for every family as transformers saves it."""

import warnings
from pathlib import Path
from typing import Protocol

import pytest
import torch
from torch import Tensor

from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.model.weights import (
    AttentionTierWeights,
    ExpertLayerWeights,
    GqaWeights,
    MlaWeights,
)
from support.checkpoint_files import load_attention, load_experts
from support.tiny_cases import CASES

PROJECTIONS = {
    MlaWeights: (
        ("q_proj", "q_proj.weight"),
        ("q_a_proj", "q_a_proj.weight"),
        ("q_a_layernorm", "q_a_layernorm.weight"),
        ("q_b_proj", "q_b_proj.weight"),
        ("kv_a_proj_with_mqa", "kv_a_proj_with_mqa.weight"),
        ("kv_a_layernorm", "kv_a_layernorm.weight"),
        ("kv_b_proj", "kv_b_proj.weight"),
        ("o_proj", "o_proj.weight"),
        ("q_a_proj_bias", "q_a_proj.bias"),
        ("kv_a_proj_bias", "kv_a_proj_with_mqa.bias"),
        ("o_proj_bias", "o_proj.bias"),
    ),
    GqaWeights: (
        ("q_proj", "q_proj.weight"),
        ("k_proj", "k_proj.weight"),
        ("v_proj", "v_proj.weight"),
        ("o_proj", "o_proj.weight"),
        ("q_bias", "q_proj.bias"),
        ("k_bias", "k_proj.bias"),
        ("v_bias", "v_proj.bias"),
        ("o_bias", "o_proj.bias"),
        ("q_norm", "q_norm.weight"),
        ("k_norm", "k_norm.weight"),
    ),
}


class DirectoryOf(Protocol):
    """The fixture `checkpoints`, as far as these tests use it."""

    def directory(self, name: str) -> Path: ...


def state_of(directory: Path) -> dict[str, Tensor]:
    """transformers' parameters and buffers in memory, where experts are fused."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return dict(model.state_dict())


def load(directory: Path) -> tuple[AttentionTierWeights, dict[int, ExpertLayerWeights]]:
    checkpoint = Checkpoint.open(directory)
    return load_attention(checkpoint), load_experts(checkpoint)


def named(
    attention: AttentionTierWeights, experts: dict[int, ExpertLayerWeights]
) -> dict[str, Tensor | None]:
    """All that was loaded, under transformers' names in memory."""
    found: dict[str, Tensor | None] = {
        "model.embed_tokens.weight": attention.embed_tokens,
        "model.norm.weight": attention.norm,
        "lm_head.weight": attention.lm_head,
    }
    for layer_id, layer in enumerate(attention.layers):
        stem = f"model.layers.{layer_id}"
        found[f"{stem}.input_layernorm.weight"] = layer.input_layernorm
        found[f"{stem}.post_attention_layernorm.weight"] = layer.post_attention_layernorm
        for field, name in PROJECTIONS[type(layer.attention)]:
            found[f"{stem}.self_attn.{name}"] = getattr(layer.attention, field)
        for block, mlp in (("mlp", layer.mlp), ("mlp.shared_experts", layer.shared_expert)):
            for part in ("gate_proj", "up_proj", "down_proj"):
                found[f"{stem}.{block}.{part}.weight"] = getattr(mlp, part, None)
        if layer.router is not None:
            found[f"{stem}.mlp.gate.weight"] = layer.router.weight
            bias = layer.router.e_score_correction_bias
            found[f"{stem}.mlp.gate.e_score_correction_bias"] = bias
            found[f"{stem}.mlp.experts.gate_up_proj"] = torch.stack(experts[layer_id].w13)
            found[f"{stem}.mlp.experts.down_proj"] = torch.stack(experts[layer_id].w2)
    return found


def loaded(directory: Path) -> dict[str, Tensor]:
    return {key: t for key, t in named(*load(directory)).items() if t is not None}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_loaded_where_transformers_has_it(
    name: str, checkpoints: DirectoryOf
) -> None:
    directory = checkpoints.directory(name)
    state = state_of(directory)
    check_equal(loaded(directory), {key: t for key, t in state.items() if t.numel()})


@pytest.mark.parametrize(
    "name", ["deepseek_v3", "qwen3_moe-norm", "glm4_moe-qknorm-bias", "mixtral"]
)
def test_experts_saved_fused_load_alike(
    name: str, checkpoints: DirectoryOf, tmp_path: Path
) -> None:
    import transformers

    directory = checkpoints.directory(name)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    names = Checkpoint.open(tmp_path / "fused").tensors
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in names)
    check_equal(loaded(directory), loaded(tmp_path / "fused"))


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral"])
def test_sharded_files_load_alike(name: str, checkpoints: DirectoryOf, tmp_path: Path) -> None:
    import transformers

    directory = checkpoints.directory(name)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    check_equal(loaded(directory), loaded(tmp_path / "sharded"))
