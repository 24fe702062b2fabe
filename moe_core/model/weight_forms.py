"""Brings what one process holds into a form of matrices, one layer at a time.

Knows which fields of the weights are matrices that rows are multiplied by (embeddings, norms and
the router, which computes in float32, are not). Knows no file and no kernel.
"""

from dataclasses import replace

from moe_core.model.matrix_forms import MatrixForm, in_form
from moe_core.model.weights import (
    ExpertWeights,
    GqaWeights,
    LayerWeights,
    MlaWeights,
    MlpWeights,
)


def layer_in_form(layer: LayerWeights, form: MatrixForm) -> LayerWeights:
    return replace(
        layer,
        attention=_attention(layer.attention, form),
        mlp=layer.mlp and mlp_in_form(layer.mlp, form),
        shared_expert=layer.shared_expert and mlp_in_form(layer.shared_expert, form),
    )


def expert_in_form(expert: ExpertWeights, form: MatrixForm) -> ExpertWeights:
    return ExpertWeights(in_form(expert.w13, form), in_form(expert.w2, form))


def mlp_in_form(mlp: MlpWeights, form: MatrixForm) -> MlpWeights:
    return MlpWeights(
        gate_proj=in_form(mlp.gate_proj, form),
        up_proj=in_form(mlp.up_proj, form),
        down_proj=in_form(mlp.down_proj, form),
    )


def _attention(weights: MlaWeights | GqaWeights, form: MatrixForm) -> MlaWeights | GqaWeights:
    if isinstance(weights, GqaWeights):
        return replace(
            weights,
            q_proj=in_form(weights.q_proj, form),
            k_proj=in_form(weights.k_proj, form),
            v_proj=in_form(weights.v_proj, form),
            o_proj=in_form(weights.o_proj, form),
        )
    return replace(
        weights,
        q_proj=None if weights.q_proj is None else in_form(weights.q_proj, form),
        q_a_proj=None if weights.q_a_proj is None else in_form(weights.q_a_proj, form),
        q_b_proj=None if weights.q_b_proj is None else in_form(weights.q_b_proj, form),
        kv_a_proj_with_mqa=in_form(weights.kv_a_proj_with_mqa, form),
        kv_b_proj=in_form(weights.kv_b_proj, form),
        o_proj=in_form(weights.o_proj, form),
    )
