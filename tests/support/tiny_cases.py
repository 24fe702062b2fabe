"""The tiny checkpoints by name: which family, and which of its branches.

Knows transformers' config classes by name and their options; draws no weights. Heads and
intermediate sizes divide by 4, so that TP of 2 and 4 can be tested on all of them.
"""

from collections.abc import Mapping

Options = Mapping[str, object]

_BASE: Options = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-2,  # far from the 1e-6 that MLA's inner norms have
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_MLA: Options = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_DEEPSEEK: Options = {
    **_BASE,
    **_MLA,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
}
_V3: Options = {**_DEEPSEEK, "num_mtp_layers": 0}
_GQA: Options = {**_BASE, "num_key_value_heads": 2, "moe_intermediate_size": 32}
_GLM: Options = {
    **_GQA,
    "head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.5,
    "num_mtp_layers": 0,
}
_QWEN: Options = {**_GQA, "head_dim": 24, "num_experts": 8, "num_experts_per_tok": 2}


def _yarn(**more: object) -> Options:
    return {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        **more,
    }


# name: (transformers' config class, its options)
CASES: Mapping[str, tuple[str, Options]] = {
    "deepseek_v3": ("DeepseekV3Config", _V3),
    "deepseek_v3-yarn-qlora": (
        "DeepseekV3Config",
        {
            **_V3,
            "rope_parameters": _yarn(mscale=1.0, mscale_all_dim=0.7, beta_fast=1.0, beta_slow=0.02),
        },
    ),
    "deepseek_v3-noqlora-ungrouped-raw-shared0": (
        "DeepseekV3Config",
        {
            **_V3,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 0,
            "norm_topk_prob": False,
            "rope_parameters": _yarn(beta_fast=1.0, beta_slow=1.0),
            "vocab_size": 127,
        },
    ),
    "deepseek_v3-halfrope-bias-tied-shared2": (
        "DeepseekV3Config",
        {
            **_V3,
            "rope_interleave": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
        },
    ),
    "deepseek_v2-greedy-noqlora": (
        "DeepseekV2Config",
        {**_DEEPSEEK, "q_lora_rank": None, "n_group": None, "topk_group": None},
    ),
    "deepseek_v2-grouped-yarn-qlora-shared2": (
        "DeepseekV2Config",
        {
            **_DEEPSEEK,
            "topk_method": "group_limited_greedy",
            "n_shared_experts": 2,
            "routed_scaling_factor": 4.0,
            "rope_parameters": _yarn(mscale=0.7, mscale_all_dim=0.7),
        },
    ),
    "qwen3_moe-norm": ("Qwen3MoeConfig", {**_QWEN, "norm_topk_prob": True}),
    "qwen3_moe-raw-bias-tied-sparse2": (
        "Qwen3MoeConfig",
        {
            **_QWEN,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe-yarn-kv1-mlponly": (
        "Qwen3MoeConfig",
        {
            **_QWEN,
            "norm_topk_prob": True,
            "num_key_value_heads": 1,
            "mlp_only_layers": [1],
            "rope_parameters": _yarn(attention_factor=1.2, truncate=False),
        },
    ),
    "glm4_moe-qknorm-bias": (
        "Glm4MoeConfig",
        {**_GLM, "use_qk_norm": True, "attention_bias": True},
    ),
    "glm4_moe-grouped-shared2": (
        "Glm4MoeConfig",
        {**_GLM, "n_group": 4, "topk_group": 2, "n_shared_experts": 2},
    ),
    "mixtral": (
        "MixtralConfig",
        {**_BASE, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
}
