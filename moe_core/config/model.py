"""What a checkpoint's config.json says, in one frozen form for all families.

Knows config.json's keys, old and new, and refuses by name what it cannot honour. Knows no
tensor names and no arithmetic.
"""

from dataclasses import dataclass
from enum import StrEnum


class RouterScoring(StrEnum):
    SIGMOID = "sigmoid"
    SOFTMAX = "softmax"
    SOFTMAX_OVER_CHOSEN = "softmax_over_chosen"


class GroupScore(StrEnum):
    """How a group of experts is ranked: by its two best or by its single best expert."""

    SUM_OF_TOP2 = "sum_of_top2"
    MAX = "max"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """rope_type is "default" or "yarn"; the rest keeps the names of `rope_parameters`."""

    rope_type: str
    rope_theta: float
    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class MlaConfig:
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True)
class MoeConfig:
    num_experts: int  # n_routed_experts, num_experts or num_local_experts
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int
    n_group: int
    topk_group: int
    scoring: RouterScoring
    group_score: GroupScore
    norm_topk_prob: bool
    routed_scaling_factor: float
    has_correction_bias: bool


@dataclass(frozen=True, slots=True)
class ModelConfig:
    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # of the per-head cache's keys; MLA: nope + rope
    max_position_embeddings: int
    rms_norm_eps: float
    attention_bias: bool
    o_proj_bias: bool
    use_qk_norm: bool
    tie_word_embeddings: bool
    dtype: str  # "bfloat16", "float32" or "float64", "float16"
    eos_token_ids: tuple[int, ...]
    rope: RopeConfig
    mla: MlaConfig | None
    moe: MoeConfig
    moe_layer_ids: tuple[int, ...]
    quantization: str | None = None  # None or "fp8_block_128"
    num_ignored_mtp_layers: int = 0
