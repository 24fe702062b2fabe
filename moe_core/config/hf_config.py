"""Hugging Face's config.json read as a ModelConfig.

Knows the keys and defaults of the five families, as published checkpoints write them and as
transformers 5 does. Knows no tensors. What cannot be honoured is refused by name; a key that
nothing here reads is refused too unless it is listed as unable to change outputs.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_core.config.config_reader import ConfigReader
from moe_core.config.hf_moe import (
    read_all_layers,
    read_deepseek_layers,
    read_deepseek_v2_moe,
    read_mixtral_moe,
    read_qwen_layers,
    read_qwen_moe,
    read_sigmoid_moe,
)
from moe_core.config.hf_rope import read_rope
from moe_core.config.model import MlaConfig, ModelConfig, MoeConfig
from moe_core.errors import ConfigError

# Keys that cannot change what a forward pass of the whole sequence computes.
_HARMLESS = frozenset(
    {
        # what made the file
        *("architectures", "transformers_version", "auto_map", "_name_or_path", "name_or_path"),
        # training and dropout
        *("attention_dropout", "initializer_range", "pretraining_tp", "ep_size", "aux_loss_alpha"),
        *("seq_aux", "router_aux_loss_coef", "router_jitter_noise", "router_z_loss_coef"),
        # tokens that the caller chooses
        *("pad_token_id", "bos_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id"),
        # what transformers returns and how it runs
        *("use_cache", "return_dict", "output_attentions", "output_hidden_states"),
        *("output_router_logits", "id2label", "label2id", "problem_type", "torchscript"),
        *("chunk_size_feed_forward", "_attn_implementation_autoset"),
        # read only where sliding_window is in use, which is refused
        "max_window_layers",
    }
)
# Kimi-K2 publishes the DeepSeek-V3 architecture under a name of its own.
_ALIASES = {"kimi_k2": "deepseek_v3"}


def read_model_config(source: Path | str | Mapping[str, object]) -> ModelConfig:
    """See ModelConfig.from_hf."""
    if isinstance(source, Mapping):
        return _read(source, {})
    path = Path(source)
    if not path.is_dir():
        return _read(_load_object(path), {})
    generation = path / "generation_config.json"
    return _read(
        _load_object(path / "config.json"), _load_object(generation) if generation.exists() else {}
    )


def _load_object(path: Path) -> Mapping[str, object]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("model", str(path), f"cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError("model", str(path), "must hold a JSON object")
    return values


@dataclass(frozen=True, slots=True)
class _Family:
    """What distinguishes one family besides the keys that all share."""

    read_moe: Callable[[ConfigReader], MoeConfig]
    read_moe_layers: Callable[[ConfigReader, int], tuple[int, ...]]
    is_mla: bool = False
    supports_attention_bias: bool = True
    o_proj_has_bias: bool = True
    default_rope_theta: float = 10_000.0
    default_partial_rotary: float = 1.0


def _read(values: Mapping[str, object], generation: Mapping[str, object]) -> ModelConfig:
    reader = ConfigReader(values)
    named = reader.raw("model_type")
    model_type = _ALIASES.get(named, named) if isinstance(named, str) else None
    family = _FAMILIES.get(model_type) if model_type is not None else None
    if model_type is None or family is None:
        supported = ", ".join(sorted({*_FAMILIES, *_ALIASES}))
        raise reader.refuse("model_type", f"is not supported; supported: {supported}")
    config = _read_family(reader, model_type, family, generation)
    reader.finish(_HARMLESS)
    return config


def _read_family(
    reader: ConfigReader, model_type: str, family: _Family, generation: Mapping[str, object]
) -> ModelConfig:
    reader.choice("hidden_act", ["silu"], "silu")
    _refuse_options_in_use(reader)
    num_layers = reader.integer("num_hidden_layers")
    heads = reader.integer("num_attention_heads")
    max_positions = reader.integer("max_position_embeddings")
    _refuse_sliding_window(reader, max_positions)
    mla = _read_mla(reader) if family.is_mla else None
    bias_options = (False, True) if family.supports_attention_bias else (False,)
    attention_bias = bool(reader.choice("attention_bias", bias_options, False))
    return ModelConfig(
        model_type=model_type,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        num_hidden_layers=num_layers,
        intermediate_size=reader.integer("intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=reader.integer("num_key_value_heads", heads),
        head_dim=_read_head_dim(reader, mla, heads),
        max_position_embeddings=max_positions,
        rms_norm_eps=reader.number("rms_norm_eps"),
        attention_bias=attention_bias,
        o_proj_bias=attention_bias and family.o_proj_has_bias,
        use_qk_norm=_read_qk_norm(reader, model_type),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        dtype=_read_dtype(reader),
        eos_token_ids=_read_eos(reader, generation),
        rope=read_rope(
            reader,
            model_type,
            max_position_embeddings=max_positions,
            default_theta=family.default_rope_theta,
            default_partial_rotary=family.default_partial_rotary,
        ),
        mla=mla,
        moe=family.read_moe(reader),
        moe_layer_ids=family.read_moe_layers(reader, num_layers),
        quantization=_read_quantization(reader),
        num_ignored_mtp_layers=reader.either(
            "num_nextn_predict_layers", "num_mtp_layers", 0, minimum=0
        ),
    )


def _refuse_options_in_use(reader: ConfigReader) -> None:
    for option in ("mlp_bias", "is_encoder_decoder", "add_cross_attention"):
        reader.choice(option, [False], False)


def _refuse_sliding_window(reader: ConfigReader, max_positions: int) -> None:
    used = reader.boolean("use_sliding_window", True)
    window = reader.optional_integer("sliding_window")
    if used and window is not None and window < max_positions:
        rule = f"is in use and below max_position_embeddings={max_positions}; not supported"
        raise reader.refuse("sliding_window", rule)


def _read_mla(reader: ConfigReader) -> MlaConfig:
    if not reader.mentions("q_lora_rank"):
        raise reader.refuse("q_lora_rank", "is required; null where queries are not compressed")
    return MlaConfig(
        q_lora_rank=reader.optional_integer("q_lora_rank"),
        kv_lora_rank=reader.integer("kv_lora_rank"),
        qk_nope_head_dim=reader.integer("qk_nope_head_dim"),
        qk_rope_head_dim=reader.integer("qk_rope_head_dim"),
        v_head_dim=reader.integer("v_head_dim"),
    )


def _read_head_dim(reader: ConfigReader, mla: MlaConfig | None, heads: int) -> int:
    hidden = reader.integer("hidden_size")
    if mla is None:
        return reader.integer("head_dim", hidden // heads)
    # transformers writes both next to the sizes that they follow from; head_dim is the rope part.
    reader.choice("head_dim", [mla.qk_rope_head_dim], mla.qk_rope_head_dim)
    reader.choice("qk_head_dim", [mla.qk_head_dim], mla.qk_head_dim)
    return mla.qk_head_dim


def _read_qk_norm(reader: ConfigReader, model_type: str) -> bool:
    if model_type == "glm4_moe":
        return reader.boolean("use_qk_norm", False)
    always = model_type == "qwen3_moe"
    return bool(reader.choice("use_qk_norm", [always], always))


def _read_dtype(reader: ConfigReader) -> str:
    names = {
        str(value).removeprefix("torch.")
        for value in (reader.raw("dtype"), reader.raw("torch_dtype"))
        if value is not None
    }
    if len(names) > 1:
        raise reader.refuse("torch_dtype", f"contradicts dtype: {' and '.join(sorted(names))}")
    return names.pop() if names else "float32"


def _read_eos(reader: ConfigReader, generation: Mapping[str, object]) -> tuple[int, ...]:
    own = reader.integers("eos_token_id")
    return ConfigReader(generation, "generation_config.").integers("eos_token_id") or own


def _read_quantization(reader: ConfigReader) -> str | None:
    values = reader.raw("quantization_config")
    if values is None:
        return None
    if not isinstance(values, dict):
        raise reader.refuse("quantization_config", "must be an object")
    nested = ConfigReader(values, "quantization_config.")
    nested.choice("quant_method", ["fp8"], None)
    nested.choice("fmt", ["e4m3"], "e4m3")
    nested.choice("activation_scheme", ["dynamic"], "dynamic")
    nested.choice("weight_block_size", [[128, 128]], None)
    # Which tensors are quantised shows in the file; how activations would be does not matter
    # to weights that are read as their published values.
    nested.finish(("modules_to_not_convert", "scale_fmt"))
    return "fp8_block_128"


_FAMILIES: Mapping[str, _Family] = {
    "deepseek_v3": _Family(read_sigmoid_moe, read_deepseek_layers, is_mla=True),
    "deepseek_v2": _Family(read_deepseek_v2_moe, read_deepseek_layers, is_mla=True),
    "qwen3_moe": _Family(read_qwen_moe, read_qwen_layers),
    "glm4_moe": _Family(
        read_sigmoid_moe,
        read_deepseek_layers,
        o_proj_has_bias=False,
        default_partial_rotary=0.5,
    ),
    "mixtral": _Family(
        read_mixtral_moe,
        read_all_layers,
        supports_attention_bias=False,
        o_proj_has_bias=False,
        default_rope_theta=1_000_000.0,
    ),
}
