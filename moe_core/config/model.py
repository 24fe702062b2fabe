"""What a checkpoint's config.json says, in one frozen form for all families.

Knows the sizes and options of a model and the rules between them. Knows neither config.json's
keys (hf_config.py reads those) nor tensor names nor arithmetic.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from moe_core.errors import ConfigError


class RouterScoring(StrEnum):
    SIGMOID = "sigmoid"
    SOFTMAX = "softmax"
    SOFTMAX_OVER_CHOSEN = "softmax_over_chosen"


class GroupScore(StrEnum):
    """How a group of experts is ranked: by its two best or by its single best expert."""

    SUM_OF_TOP2 = "sum_of_top2"
    MAX = "max"


def _require(holds: bool, setting: str, value: object, rule: str) -> None:
    if not holds:
        raise ConfigError(setting, value, rule)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """rope_type is "default" or "yarn"; the rest keeps the names of `rope_parameters`.

    interleaved: rotated pairs are neighbours (x0, x1), not (x0, x_half).
    """

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

    def __post_init__(self) -> None:
        known = self.rope_type in ("default", "yarn")
        _require(known, "rope_type", self.rope_type, "must be 'default' or 'yarn'")
        _require(self.rope_theta > 1, "rope_theta", self.rope_theta, "must be above 1")
        partial = self.partial_rotary_factor
        _require(0 < partial <= 1, "partial_rotary_factor", partial, "must be in (0, 1]")
        if self.rope_type == "yarn":
            _require(self.factor > 0, "rope factor", self.factor, "must be positive for yarn")
            original = self.original_max_position_embeddings
            rule = "must be positive for yarn"
            _require(original > 0, "original_max_position_embeddings", original, rule)


@dataclass(frozen=True, slots=True)
class MlaConfig:
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        rope = self.qk_rope_head_dim
        _require(rope % 2 == 0, "qk_rope_head_dim", rope, "must be even: it is rotated in pairs")

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values per token and layer of the compressed cache."""
        return self.kv_lora_rank + self.qk_rope_head_dim


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

    def __post_init__(self) -> None:
        whole = self.num_experts % self.n_group == 0
        _require(whole, "n_group", self.n_group, f"must divide the {self.num_experts} experts")
        kept = 1 <= self.topk_group <= self.n_group
        _require(kept, "topk_group", self.topk_group, f"must be in 1..n_group={self.n_group}")
        pairs = self.experts_per_group >= 2 or self.group_score is GroupScore.MAX
        _require(pairs, "n_group", self.n_group, "a group is ranked by its two best experts")
        most = self.topk_group * self.experts_per_group
        rule = f"must be in 1..{most}, the experts in the topk_group={self.topk_group} kept groups"
        top_k = self.num_experts_per_tok
        _require(1 <= top_k <= most, "num_experts_per_tok", top_k, rule)

    @property
    def experts_per_group(self) -> int:
        return self.num_experts // self.n_group

    @property
    def shared_intermediate_size(self) -> int:
        """Of the shared experts merged into one gated MLP; 0 without any."""
        return self.n_shared_experts * self.moe_intermediate_size


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

    @classmethod
    def from_hf(cls, source: Path | str | Mapping[str, object]) -> "ModelConfig":
        """From a model directory, a config.json or its parsed content.

        A directory's generation_config.json, if any, decides the end-of-sequence tokens.
        Raises ConfigError naming the first key or value that cannot be honoured.
        """
        from moe_core.config.hf_config import read_model_config  # it imports this module

        return read_model_config(source)

    def __post_init__(self) -> None:
        known = self.dtype in ("bfloat16", "float16", "float32", "float64")
        _require(known, "dtype", self.dtype, "must be bfloat16, float16, float32 or float64")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        rule = f"must divide num_attention_heads={heads}"
        _require(heads % kv_heads == 0, "num_key_value_heads", kv_heads, rule)
        if self.mla is not None:
            rule = f"must equal num_attention_heads={heads}: MLA has a key for every head"
            _require(kv_heads == heads, "num_key_value_heads", kv_heads, rule)
            rule = f"must be qk_nope_head_dim + qk_rope_head_dim = {self.mla.qk_head_dim}"
            _require(self.head_dim == self.mla.qk_head_dim, "head_dim", self.head_dim, rule)
        rotary = self.rotary_dim
        _require(rotary > 0 and rotary % 2 == 0, "rotary dimensions", rotary, "must be even")
        ids = self.moe_layer_ids
        inside = all(0 <= i < self.num_hidden_layers for i in ids) and ids == tuple(
            sorted(set(ids))
        )
        rule = f"must be ascending layer numbers below {self.num_hidden_layers}"
        _require(inside, "moe_layer_ids", ids, rule)

    @property
    def v_head_dim(self) -> int:
        return self.head_dim if self.mla is None else self.mla.v_head_dim

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a head (MLA: of its rope part) that are rotated."""
        if self.mla is not None:
            return self.mla.qk_rope_head_dim
        return int(self.head_dim * self.rope.partial_rotary_factor)

    def is_moe_layer(self, layer_id: int) -> bool:
        return layer_id in self.moe_layer_ids

    def local_heads(self, tp_size: int) -> int:
        """Query heads of one attention TP rank. Raises ConfigError where tp does not divide."""
        rule = f"must divide num_attention_heads={self.num_attention_heads}"
        _require(self.num_attention_heads % tp_size == 0, "attention tp", tp_size, rule)
        return self.num_attention_heads // tp_size

    def local_kv_heads(self, tp_size: int) -> int:
        """KV heads of one attention TP rank: its share, or one that other ranks hold too."""
        kv_heads = self.num_key_value_heads
        divides = kv_heads % tp_size == 0 or tp_size % kv_heads == 0
        rule = f"must divide num_key_value_heads={kv_heads} or be a multiple of it"
        _require(divides, "attention tp", tp_size, rule)
        return max(1, kv_heads // tp_size)

    def fingerprint_fields(self) -> dict[str, object]:
        """Every field that changes outputs, as JSON values in a fixed order."""
        fields = asdict(self)
        del fields["num_ignored_mtp_layers"]
        return fields
