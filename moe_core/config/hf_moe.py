"""The MoE part of config.json, per family: sizes, router, and which layers have experts.

Knows the keys and what published code and transformers 5 make of them; computes nothing.
"""

from moe_core.config.config_reader import ConfigReader
from moe_core.config.model import GroupScore, MoeConfig, RouterScoring


def read_deepseek_layers(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    first = reader.integer("first_k_dense_replace", minimum=0)
    frequency = reader.integer("moe_layer_freq", 1)
    return tuple(i for i in range(num_layers) if i >= first and i % frequency == 0)


def read_qwen_layers(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    dense = reader.integers("mlp_only_layers")
    step = reader.integer("decoder_sparse_step", 1)
    return tuple(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)


def read_all_layers(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    return tuple(range(num_layers))


def read_sigmoid_moe(reader: ConfigReader) -> MoeConfig:
    """deepseek_v3 and glm4_moe."""
    reader.choice("scoring_func", ["sigmoid"], "sigmoid")
    reader.choice("topk_method", ["noaux_tc"], "noaux_tc")
    return MoeConfig(
        num_experts=reader.either("n_routed_experts", "num_local_experts"),
        num_experts_per_tok=reader.integer("num_experts_per_tok"),
        moe_intermediate_size=reader.integer("moe_intermediate_size"),
        n_shared_experts=reader.integer("n_shared_experts", 0, minimum=0),
        n_group=reader.integer("n_group"),
        topk_group=reader.integer("topk_group"),
        scoring=RouterScoring.SIGMOID,
        group_score=GroupScore.SUM_OF_TOP2,
        norm_topk_prob=reader.boolean("norm_topk_prob", True),
        routed_scaling_factor=reader.number("routed_scaling_factor"),
        has_correction_bias=True,
    )


def read_deepseek_v2_moe(reader: ConfigReader) -> MoeConfig:
    reader.choice("scoring_func", ["softmax"], "softmax")
    methods = ["greedy", "group_limited_greedy"]
    grouped = reader.choice("topk_method", methods, "greedy") == "group_limited_greedy"
    n_group, topk_group = reader.optional_integer("n_group"), reader.optional_integer("topk_group")
    if grouped and (n_group is None or topk_group is None):
        raise reader.refuse("n_group", "and topk_group are required by group_limited_greedy")
    if reader.boolean("norm_topk_prob", False):
        # The published code then drops routed_scaling_factor; transformers does not normalise.
        rule = "is not supported for deepseek_v2: its meaning is disputed"
        raise reader.refuse("norm_topk_prob", rule)
    return MoeConfig(
        num_experts=reader.either("n_routed_experts", "num_experts"),
        num_experts_per_tok=reader.integer("num_experts_per_tok"),
        moe_intermediate_size=reader.integer("moe_intermediate_size"),
        n_shared_experts=reader.integer("n_shared_experts", 0, minimum=0),
        n_group=n_group if grouped and n_group else 1,
        topk_group=topk_group if grouped and topk_group else 1,
        scoring=RouterScoring.SOFTMAX,
        group_score=GroupScore.MAX,
        norm_topk_prob=False,
        routed_scaling_factor=reader.number("routed_scaling_factor", 1.0),
        has_correction_bias=False,
    )


def _read_plain_moe(
    reader: ConfigReader, intermediate_key: str, scoring: RouterScoring, norm_topk_prob: bool
) -> MoeConfig:
    return MoeConfig(
        num_experts=reader.either("num_experts", "num_local_experts"),
        num_experts_per_tok=reader.integer("num_experts_per_tok"),
        moe_intermediate_size=reader.integer(intermediate_key),
        n_shared_experts=0,
        n_group=1,
        topk_group=1,
        scoring=scoring,
        group_score=GroupScore.MAX,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=1.0,
        has_correction_bias=False,
    )


def read_qwen_moe(reader: ConfigReader) -> MoeConfig:
    normalised = reader.boolean("norm_topk_prob", False)
    return _read_plain_moe(reader, "moe_intermediate_size", RouterScoring.SOFTMAX, normalised)


def read_mixtral_moe(reader: ConfigReader) -> MoeConfig:
    return _read_plain_moe(reader, "intermediate_size", RouterScoring.SOFTMAX_OVER_CHOSEN, False)
