"""The parameters that one process holds, by what they are for.

The checkpoint loader fills these and the model reads them; this module knows the shapes and
nothing of files, ranks on the wire or arithmetic. All matrices are stored as checkpoints
store them, `[out_features, in_features]`, or in another form (matrix_forms.py). `/tp` marks a
dimension of which an attention TP rank holds its share, `/etp` the same for an expert TP rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_core.model.matrix_forms import Matrix

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class MlaWeights:
    """Multi-head latent attention. Either q_proj or the q_a/q_b pair is there."""

    q_proj: Matrix | None  # [heads/tp · (nope + rope), hidden]
    q_a_proj: Matrix | None  # [q_lora_rank, hidden]
    q_a_layernorm: Tensor | None  # [q_lora_rank]
    q_b_proj: Matrix | None  # [heads/tp · (nope + rope), q_lora_rank]
    kv_a_proj_with_mqa: Matrix  # [kv_lora_rank + rope, hidden]
    kv_a_layernorm: Tensor  # [kv_lora_rank]
    kv_b_proj: Matrix  # [heads/tp · (nope + v_head_dim), kv_lora_rank]
    o_proj: Matrix  # [hidden, heads/tp · v_head_dim]
    q_a_proj_bias: Tensor | None = None  # [q_lora_rank]; attention_bias of the config
    kv_a_proj_bias: Tensor | None = None  # [kv_lora_rank + rope]
    o_proj_bias: Tensor | None = None  # [hidden]; added by tp_rank 0 only


@dataclass(frozen=True, slots=True)
class GqaWeights:
    """Grouped-query attention; kv heads are replicated where there are fewer than tp."""

    q_proj: Matrix  # [heads/tp · head_dim, hidden]
    k_proj: Matrix  # [max(1, kv_heads/tp) · head_dim, hidden]
    v_proj: Matrix  # [max(1, kv_heads/tp) · head_dim, hidden]
    o_proj: Matrix  # [hidden, heads/tp · head_dim]
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None  # [hidden]; added by tp_rank 0 only
    q_norm: Tensor | None = None  # [head_dim]
    k_norm: Tensor | None = None  # [head_dim]


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """Gated MLP: a dense layer, or the shared experts merged into one."""

    gate_proj: Matrix  # [intermediate/tp, hidden]
    up_proj: Matrix  # [intermediate/tp, hidden]
    down_proj: Matrix  # [hidden, intermediate/tp]


@dataclass(frozen=True, slots=True)
class RouterWeights:
    weight: Tensor  # [num_experts, hidden]
    e_score_correction_bias: Tensor | None  # [num_experts] float32


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer without its routed experts. Exactly one of mlp and router is there;
    shared_expert only next to a router and only where the attention tier runs it."""

    input_layernorm: Tensor  # [hidden]
    post_attention_layernorm: Tensor  # [hidden]
    attention: MlaWeights | GqaWeights
    mlp: MlpWeights | None
    router: RouterWeights | None
    shared_expert: MlpWeights | None


@dataclass(frozen=True, slots=True)
class AttentionTierWeights:
    """Everything an attention process holds.

    The vocabulary is cut into tp contiguous parts of ceil(vocab_size / tp) rows; the last
    may be shorter. With tied embeddings lm_head is embed_tokens.
    """

    embed_tokens: Tensor  # [vocab part, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden]
    lm_head: Matrix  # [vocab part, hidden]


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One routed expert of one layer, as one expert process holds it."""

    w13: Matrix  # [2 · moe_intermediate/etp, hidden], gate rows then up rows
    w2: Matrix  # [hidden, moe_intermediate/etp]


@dataclass(frozen=True, slots=True)
class ExpertLayerWeights:
    """The routed experts of one MoE layer that one expert process holds, by local id; None stands
    where a local id is not held."""

    # [num_local_experts, 2 · moe_intermediate/etp, hidden], gate rows then up rows
    w13: Tensor | Sequence[Matrix | None]
    w2: Tensor | Sequence[Matrix | None]  # [num_local_experts, hidden, moe_intermediate/etp]
    shared: MlpWeights | None  # only where the expert tier runs the shared expert; cut by etp
