"""Model configurations made by hand, for tests that need counts and widths but no checkpoint."""

from moe_core.config.model import (
    GroupScore,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    RouterScoring,
)


def moe_model(
    *,
    num_experts: int = 8,
    top_k: int = 2,
    hidden_size: int = 16,
    moe_intermediate_size: int = 8,
    n_shared_experts: int = 1,
    num_heads: int = 4,
    num_kv_heads: int = 4,
    num_layers: int = 3,
    intermediate_size: int = 32,
    mla: bool = False,
    quantization: str | None = None,
) -> ModelConfig:
    """A model whose first layer is dense."""
    return ModelConfig(
        model_type="deepseek_v3",
        vocab_size=64,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        intermediate_size=intermediate_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads if mla else num_kv_heads,
        head_dim=8,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        attention_bias=False,
        o_proj_bias=False,
        use_qk_norm=False,
        tie_word_embeddings=False,
        dtype="float32",
        eos_token_ids=(1,),
        rope=RopeConfig("default", 10000.0),
        mla=MlaConfig(None, 8, 4, 4, 4) if mla else None,
        moe=MoeConfig(
            num_experts=num_experts,
            num_experts_per_tok=min(top_k, num_experts),
            moe_intermediate_size=moe_intermediate_size,
            n_shared_experts=n_shared_experts,
            n_group=1,
            topk_group=1,
            scoring=RouterScoring.SIGMOID,
            group_score=GroupScore.MAX,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
            has_correction_bias=True,
        ),
        moe_layer_ids=tuple(range(1, num_layers)),
        quantization=quantization,
    )


def deepseek_v3_model() -> ModelConfig:
    """The counts and widths of the published DeepSeek-V3, as FP8 blocks."""
    return moe_model(
        num_experts=256,
        top_k=8,
        hidden_size=7168,
        moe_intermediate_size=2048,
        num_heads=128,
        num_kv_heads=128,
        num_layers=61,
        intermediate_size=18432,
        mla=True,
        quantization="fp8_block_128",
    )
