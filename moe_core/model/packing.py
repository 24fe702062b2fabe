"""Packs what one process holds, one layer at a time.

Knows which fields of the weights are matrices that rows are multiplied by (embeddings, norms and
the router, which computes in float32, are not). Knows no file and no kernel.
"""

from dataclasses import replace

from torch import Tensor

from moe_core.model.linear import Matrix, pack
from moe_core.model.weights import (
    ExpertLayerWeights,
    GqaWeights,
    LayerWeights,
    MlaWeights,
    MlpWeights,
)


def packed_layer(layer: LayerWeights) -> LayerWeights:
    return replace(
        layer,
        attention=_attention(layer.attention),
        mlp=_mlp(layer.mlp),
        shared_expert=_mlp(layer.shared_expert),
    )


def packed_experts(layer: ExpertLayerWeights) -> ExpertLayerWeights:
    return ExpertLayerWeights(
        w13=tuple(_of_its_own(_pack(matrix)) for matrix in layer.w13),
        w2=tuple(_of_its_own(_pack(matrix)) for matrix in layer.w2),
        shared=_mlp(layer.shared),
    )


def _pack(matrix: Matrix) -> Matrix:
    return pack(matrix) if isinstance(matrix, Tensor) else matrix


def _of_its_own(matrix: Matrix) -> Matrix:
    """A slice of a stack that stayed plain would hold on to the whole of it."""
    return matrix.clone() if isinstance(matrix, Tensor) else matrix


def _mlp(mlp: MlpWeights | None) -> MlpWeights | None:
    if mlp is None:
        return None
    return MlpWeights(_pack(mlp.gate_proj), _pack(mlp.up_proj), _pack(mlp.down_proj))


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
