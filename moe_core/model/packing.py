"""Packs what one process holds, one layer at a time.

Knows which fields of the weights are matrices that rows are multiplied by (embeddings, norms and
the router, which computes in float32, are not). Knows no file and no kernel.
"""

from dataclasses import replace

from torch import Tensor

from moe_core.model.linear import Matrix, pack
from moe_core.model.weights import (
    ExpertWeights,
    GqaWeights,
    LayerWeights,
    MlaWeights,
    MlpWeights,
)


def packed_layer(layer: LayerWeights) -> LayerWeights:
    return replace(
        layer,
        attention=_attention(layer.attention),
        mlp=layer.mlp and packed_mlp(layer.mlp),
        shared_expert=layer.shared_expert and packed_mlp(layer.shared_expert),
    )


def packed_expert(expert: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(_pack(expert.w13), _pack(expert.w2))


def packed_mlp(mlp: MlpWeights) -> MlpWeights:
    return MlpWeights(_pack(mlp.gate_proj), _pack(mlp.up_proj), _pack(mlp.down_proj))


def _pack(matrix: Matrix) -> Matrix:
    return pack(matrix) if isinstance(matrix, Tensor) else matrix


def _attention(weights: MlaWeights | GqaWeights) -> MlaWeights | GqaWeights:
    if isinstance(weights, GqaWeights):
        return replace(
            weights,
            q_proj=_pack(weights.q_proj),
            k_proj=_pack(weights.k_proj),
            v_proj=_pack(weights.v_proj),
            o_proj=_pack(weights.o_proj),
        )
    return replace(
        weights,
        q_proj=None if weights.q_proj is None else _pack(weights.q_proj),
        q_a_proj=None if weights.q_a_proj is None else _pack(weights.q_a_proj),
        q_b_proj=None if weights.q_b_proj is None else _pack(weights.q_b_proj),
        kv_a_proj_with_mqa=_pack(weights.kv_a_proj_with_mqa),
        kv_b_proj=_pack(weights.kv_b_proj),
        o_proj=_pack(weights.o_proj),
    )
