"""ParallelConfig: what is accepted, what is refused, and that every suggestion would do."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ConfigError
from moe_core.placement import ExpertPlacement
from support.moe_configs import deepseek_v3_model, moe_model
from support.patience import patient

SETTINGS = {field.name for field in fields(ParallelConfig)}

sizes = st.integers(-2, 12) | st.sampled_from([16, 24, 32, 64])
any_settings = st.fixed_dictionaries(
    {
        "attn_devices": sizes,
        "expert_devices": sizes,
        "dp_size": sizes,
        "ep_size": sizes,
        "enable_mla": st.none() | st.booleans(),
        "expert_parallel_degree": st.none() | st.integers(-1, 4),
        "num_redundant_experts": st.integers(-1, 70),
        "shared_experts": st.sampled_from(["attention", "expert", "both"]),
        "colocated": st.booleans(),
    }
)
models = st.builds(
    moe_model,
    num_experts=st.integers(1, 12),
    moe_intermediate_size=st.sampled_from([8, 12, 256, 384]),
    n_shared_experts=st.integers(0, 2),
    num_heads=st.sampled_from([6, 12, 24]),
    num_kv_heads=st.sampled_from([1, 2, 3, 6]),
    intermediate_size=st.sampled_from([12, 64]),
    mla=st.booleans(),
    quantization=st.none() | st.just("fp8_block_128"),
)


def build(settings: dict[str, object], model: ModelConfig | None) -> ParallelConfig:
    config = ParallelConfig(**settings)
    return config if model is None else config.with_model(model)


def refusal(settings: dict[str, object], model: ModelConfig | None) -> ConfigError | None:
    try:
        build(settings, model)
    except ConfigError as error:
        return error
    return None


def what_was_known(settings: dict[str, object], model: ModelConfig | None) -> ModelConfig | None:
    """What is refused before the model is known cannot make suggestions for that model."""
    return model if refusal(settings, None) is None else None


def assert_text_says_all(error: ConfigError) -> None:
    said, _, nearest = str(error).partition("; nearest valid: ")
    assert said == f"{error.setting}={error.value!r}: {error.rule}"
    assert error.rule
    assert nearest == ", ".join(str(value) for value in error.nearest)


@patient
@given(settings=any_settings, model=st.none() | models)
def test_every_configuration_builds_or_names_one_setting_and_values_that_do_better(
    settings: dict[str, object], model: ModelConfig | None
) -> None:
    """Taking one suggestion after another ends in a configuration that builds, or at a setting
    for which nothing would do."""
    for _ in range(2 * len(SETTINGS)):
        error = refusal(settings, model)
        if error is None:
            return
        assert error.setting in SETTINGS
        assert error.value == settings[error.setting]
        assert_text_says_all(error)
        if not error.nearest:
            return
        known = what_was_known(settings, model)
        for value in error.nearest:
            still = refusal({**settings, error.setting: value}, known)
            assert still is None or still.setting != error.setting
        settings = {**settings, error.setting: error.nearest[0]}
    assert refusal(settings, model) is None


@patient
@given(settings=any_settings, model=st.none() | models)
def test_suggestions_all_build_if_one_does(
    settings: dict[str, object], model: ModelConfig | None
) -> None:
    error = refusal(settings, model)
    if error is not None:
        known = what_was_known(settings, model)
        variants = [{**settings, error.setting: value} for value in error.nearest]
        remaining = [refusal(variant, known) for variant in variants]
        assert all(remaining) or not any(remaining)


@patient
@given(settings=any_settings)
def test_without_a_model_there_is_always_a_suggestion(settings: dict[str, object]) -> None:
    error = refusal(settings, None)
    assert error is None or error.nearest


@patient
@given(settings=any_settings, model=models)
def test_a_settled_configuration_has_no_open_setting_and_settles_to_itself(
    settings: dict[str, object], model: ModelConfig
) -> None:
    try:
        settled = build(settings, model)
    except ConfigError:
        return
    assert settled.enable_mla is not None
    assert settled.expert_parallel_degree == settled.degree
    assert settled.with_model(model) == settled


@patient
@given(settings=any_settings)
def test_ranks_count_through_groups_whose_tp_is_contiguous(settings: dict[str, object]) -> None:
    try:
        config = ParallelConfig(**settings)
    except ConfigError:
        return
    attention = [config.attention_ranks(rank) for rank in range(config.attn_devices)]
    assert attention == [(d, t) for d in range(config.dp_size) for t in range(config.tp_size)]
    experts = [config.expert_ranks(rank) for rank in range(config.expert_devices)]
    assert experts == [(e, t) for e in range(config.ep_size) for t in range(config.etp_size)]


@pytest.mark.parametrize(
    ("settings", "setting", "nearest"),
    [
        ({"attn_devices": 0}, "attn_devices", (1, 2)),
        ({"expert_devices": True}, "expert_devices", (1, 2)),
        ({"attn_devices": 8, "dp_size": 3}, "dp_size", (2, 4)),
        ({"attn_devices": 8, "dp_size": 16}, "dp_size", (4, 8)),
        ({"attn_devices": 6, "dp_size": 4}, "dp_size", (1, 2)),
        ({"expert_devices": 4, "ep_size": 8}, "ep_size", (2, 4)),
        (
            {"expert_devices": 2, "ep_size": 2, "expert_parallel_degree": 0},
            *("expert_parallel_degree", (1, 2)),
        ),
        (
            {"expert_devices": 4, "ep_size": 2, "expert_parallel_degree": 2},
            *("expert_parallel_degree", (1,)),
        ),
        ({"expert_parallel_degree": 3}, "expert_parallel_degree", (0, 1, 2)),
        ({"num_redundant_experts": 1}, "num_redundant_experts", (0,)),
        ({"num_redundant_experts": -1}, "num_redundant_experts", (0,)),
        ({"shared_experts": "both"}, "shared_experts", ("attention", "expert")),
        ({"attn_devices": 2, "colocated": True}, "colocated", (False,)),
    ],
)
def test_a_refusal_names_setting_value_and_nearest(
    settings: dict[str, object], setting: str, nearest: tuple[object, ...]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        ParallelConfig(**settings)
    assert (refusal.value.setting, refusal.value.nearest) == (setting, nearest)


@pytest.mark.parametrize(
    ("settings", "model", "setting", "nearest"),
    [
        ({"enable_mla": True}, moe_model(), "enable_mla", (False,)),
        (
            {"shared_experts": "expert"},
            moe_model(n_shared_experts=0),
            *("shared_experts", ("attention",)),
        ),
        ({"attn_devices": 8}, moe_model(num_heads=4, num_kv_heads=4), "dp_size", (2, 4)),
        ({"attn_devices": 3}, moe_model(num_heads=4, num_kv_heads=4), "attn_devices", (2, 4)),
        ({"attn_devices": 4}, moe_model(num_heads=6, num_kv_heads=3), "dp_size", (4,)),
        ({"expert_devices": 16}, moe_model(moe_intermediate_size=8), "ep_size", (2, 4)),
        (
            {"expert_devices": 4},
            moe_model(moe_intermediate_size=256, quantization="fp8_block_128"),
            *("ep_size", (2, 4)),
        ),
        (
            {"expert_devices": 2, "ep_size": 2, "num_redundant_experts": 9},
            moe_model(),
            *("num_redundant_experts", (8,)),
        ),
        ({"expert_devices": 16, "ep_size": 16}, moe_model(), "ep_size", (4, 8)),
    ],
)
def test_a_refusal_for_a_model_names_setting_value_and_nearest(
    settings: dict[str, object], model: ModelConfig, setting: str, nearest: tuple[object, ...]
) -> None:
    config = ParallelConfig(**settings)
    with pytest.raises(ConfigError) as refusal:
        config.with_model(model)
    assert (refusal.value.setting, refusal.value.nearest) == (setting, nearest)


def test_defaults_follow_the_model_and_ep_size() -> None:
    plain = ParallelConfig().with_model(moe_model())
    assert (plain.enable_mla, plain.expert_parallel_degree) == (False, 0)
    parallel = ParallelConfig(expert_devices=4, ep_size=2).with_model(moe_model(mla=True))
    assert (parallel.enable_mla, parallel.expert_parallel_degree) == (True, 1)


def test_mla_may_be_switched_off_on_a_model_that_has_it() -> None:
    assert ParallelConfig(enable_mla=False).with_model(moe_model(mla=True)).enable_mla is False


@pytest.mark.parametrize(
    ("settings", "model", "text"),
    [
        (
            {"attn_devices": 8, "dp_size": 3},
            None,
            "dp_size=3: must be a power of two; nearest valid: 2, 4",
        ),
        (
            {"expert_devices": 4, "ep_size": 8},
            None,
            "ep_size=8: must divide expert_devices=4; nearest valid: 2, 4",
        ),
        (
            {"expert_devices": 4, "ep_size": 2, "expert_parallel_degree": 2},
            None,
            "expert_parallel_degree=2: needs ep_size equal to expert_devices, not ep_size=2 and "
            "expert_devices=4; nearest valid: 1",
        ),
        (
            {"enable_mla": True},
            moe_model(),
            "enable_mla=True: deepseek_v3 has no multi-head latent attention; nearest valid: False",
        ),
        (
            {"expert_devices": 16},
            moe_model(moe_intermediate_size=8),
            "ep_size=1: makes etp_size = expert_devices / ep_size = 16, which must divide "
            "moe_intermediate_size=8; nearest valid: 2, 4",
        ),
    ],
)
def test_a_refusal_reads_as_one_sentence(
    settings: dict[str, object], model: ModelConfig | None, text: str
) -> None:
    assert str(refusal(settings, model)) == text


def test_degree_1_on_one_ep_group_is_allowed() -> None:
    assert ParallelConfig(expert_devices=2, expert_parallel_degree=1).degree == 1


def test_a_rank_outside_its_tier_is_refused() -> None:
    config = ParallelConfig(expert_devices=2)
    with pytest.raises(ConfigError, match="must be from 0 to 1"):
        config.expert_ranks(2)


def experts_per_process(config: ParallelConfig) -> set[int]:
    """Routed and redundant slots of one layer, and the shared expert's copy."""
    placement = ExpertPlacement.initial(deepseek_v3_model(), config)
    layer = placement.layer(30)
    return {
        len(layer.physical_experts(ep_rank)) + config.shared_on_experts
        for ep_rank in range(config.ep_size)
    }


def test_the_seed_example_at_level_1_holds_8_and_1_and_1_experts() -> None:
    config = ParallelConfig(
        attn_devices=64,
        expert_devices=64,
        dp_size=32,
        ep_size=32,
        num_redundant_experts=32,
        shared_experts="expert",
        colocated=True,
    ).with_model(deepseek_v3_model())
    assert (config.tp_size, config.etp_size, config.degree) == (2, 2, 1)
    assert config.enable_mla is True
    assert experts_per_process(config) == {8 + 1 + 1}


def test_the_seed_example_at_level_2_holds_4_and_1_and_1_experts() -> None:
    config = ParallelConfig(
        attn_devices=64,
        expert_devices=64,
        dp_size=64,
        ep_size=64,
        expert_parallel_degree=2,
        num_redundant_experts=64,
        shared_experts="expert",
        colocated=True,
    ).with_model(deepseek_v3_model())
    assert (config.tp_size, config.etp_size, config.degree) == (1, 1, 2)
    assert experts_per_process(config) == {4 + 1 + 1}


def test_the_seed_example_at_level_2_needs_ep_size_64() -> None:
    with pytest.raises(ConfigError, match="ep_size=32") as refusal:
        ParallelConfig(64, 64, 32, 32, expert_parallel_degree=2)
    assert refusal.value.setting == "expert_parallel_degree"
    assert replace(ParallelConfig(64, 64, 32, 64), expert_parallel_degree=2).degree == 2
