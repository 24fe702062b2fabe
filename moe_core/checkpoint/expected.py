"""Every tensor that a checkpoint must hold, with its shape.

Knows shapes and which dimension tensor parallelism cuts; knows no bytes and no ranks.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass

from moe_core.checkpoint.names import (
    EMBED_TOKENS,
    FINAL_NORM,
    LM_HEAD,
    GatedMlpNames,
    attention_name,
    dense_mlp_names,
    layer_name,
    moe_names,
)
from moe_core.config.model import MlaConfig, ModelConfig

ROWS, COLUMNS = 0, 1
Named = Iterator[tuple[str, "TensorSpec"]]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """`cut_axis` is the dimension along which ranks take slices; None where they read all of it.
    `linear` says that the tensor may be FP8 with block scales."""

    shape: tuple[int, ...]
    cut_axis: int | None = None
    linear: bool = False
    optional: bool = False


def expected_tensors(config: ModelConfig, present: Container[str]) -> dict[str, TensorSpec]:
    """By name; `present` decides between the two ways of naming a layer's experts."""
    vocabulary = (config.vocab_size, config.hidden_size)
    tied = config.tie_word_embeddings
    expected = {
        EMBED_TOKENS: TensorSpec(vocabulary, ROWS),
        FINAL_NORM: TensorSpec((config.hidden_size,)),
        LM_HEAD: TensorSpec(vocabulary, ROWS, optional=tied),
    }
    for layer_id in range(config.num_hidden_layers):
        expected.update(_layer(config, layer_id, present))
    return expected


def _layer(config: ModelConfig, layer_id: int, present: Container[str]) -> Named:
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield layer_name(layer_id, f"{norm}.weight"), TensorSpec((config.hidden_size,))
    attention = _gqa(config) if config.mla is None else _mla(config, config.mla)
    for part, spec in attention:
        yield attention_name(layer_id, part), spec
    if config.is_moe_layer(layer_id):
        yield from _moe(config, layer_id, present)
    else:
        names = dense_mlp_names(layer_id)
        yield from _gated_mlp(names, config.hidden_size, config.intermediate_size)


def _linear(rows: int, columns: int, cut_axis: int | None) -> TensorSpec:
    return TensorSpec((rows, columns), cut_axis, linear=True)


def _gqa(config: ModelConfig) -> Named:
    hidden, head_dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    for part, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield f"{part}.weight", _linear(rows, hidden, ROWS)
        if config.attention_bias:
            yield f"{part}.bias", TensorSpec((rows,), ROWS)
    yield "o_proj.weight", _linear(hidden, queries, COLUMNS)
    if config.o_proj_bias:
        yield "o_proj.bias", TensorSpec((hidden,))
    if config.use_qk_norm:
        yield "q_norm.weight", TensorSpec((head_dim,))
        yield "k_norm.weight", TensorSpec((head_dim,))


def _mla(config: ModelConfig, mla: MlaConfig) -> Named:
    hidden, heads = config.hidden_size, config.num_attention_heads
    yield from _mla_queries(config, mla)
    yield "kv_a_proj_with_mqa.weight", _linear(mla.latent_dim, hidden, None)
    yield "kv_a_layernorm.weight", TensorSpec((mla.kv_lora_rank,))
    keys_and_values = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    yield "kv_b_proj.weight", _linear(keys_and_values, mla.kv_lora_rank, ROWS)
    yield "o_proj.weight", _linear(hidden, heads * mla.v_head_dim, COLUMNS)
    if config.attention_bias:
        yield "kv_a_proj_with_mqa.bias", TensorSpec((mla.latent_dim,))
    if config.o_proj_bias:
        yield "o_proj.bias", TensorSpec((hidden,))


def _mla_queries(config: ModelConfig, mla: MlaConfig) -> Named:
    hidden, rank = config.hidden_size, mla.q_lora_rank
    queries = config.num_attention_heads * mla.qk_head_dim
    if rank is None:
        yield "q_proj.weight", _linear(queries, hidden, ROWS)
        return
    yield "q_a_proj.weight", _linear(rank, hidden, None)
    yield "q_a_layernorm.weight", TensorSpec((rank,))
    yield "q_b_proj.weight", _linear(queries, rank, ROWS)
    if config.attention_bias:
        yield "q_a_proj.bias", TensorSpec((rank,))


def _gated_mlp(names: GatedMlpNames, hidden: int, intermediate: int) -> Named:
    yield names.gate, _linear(intermediate, hidden, ROWS)
    yield names.up, _linear(intermediate, hidden, ROWS)
    yield names.down, _linear(hidden, intermediate, COLUMNS)


def _moe(config: ModelConfig, layer_id: int, present: Container[str]) -> Named:
    moe, hidden = config.moe, config.hidden_size
    names, intermediate = moe_names(config, layer_id, present), moe.moe_intermediate_size
    yield names.router, TensorSpec((moe.num_experts, hidden))
    if moe.has_correction_bias:
        yield names.correction_bias, TensorSpec((moe.num_experts,))
    if moe.n_shared_experts:
        yield from _gated_mlp(names.shared, hidden, moe.shared_intermediate_size)
    if names.fused:
        yield names.fused_gate_up, TensorSpec((moe.num_experts, 2 * intermediate, hidden), ROWS)
        yield names.fused_down, TensorSpec((moe.num_experts, hidden, intermediate), ROWS)
        return
    for expert in range(moe.num_experts):
        yield from _gated_mlp(names.expert(expert), hidden, intermediate)
