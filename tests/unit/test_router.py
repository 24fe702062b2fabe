"""The router against the formula written out in plain numbers, one token at a time."""

from dataclasses import replace

import pytest
import torch

from moe_core.config.model import GroupScore, MoeConfig, RouterScoring
from moe_core.model.router import Router, route
from moe_core.model.weights import RouterWeights
from support.plain_router import plain_route

MOE = MoeConfig(
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=32,
    n_shared_experts=0,
    n_group=4,
    topk_group=2,
    scoring=RouterScoring.SIGMOID,
    group_score=GroupScore.SUM_OF_TOP2,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    has_correction_bias=True,
)
SOFTMAX = replace(
    MOE, scoring=RouterScoring.SOFTMAX, group_score=GroupScore.MAX, has_correction_bias=False
)
VARIANTS = {
    "sigmoid-grouped": MOE,
    "sigmoid-raw": replace(MOE, norm_topk_prob=False),
    "sigmoid-ungrouped": replace(MOE, n_group=1, topk_group=1),
    "sigmoid-all-groups": replace(MOE, topk_group=4),
    "softmax-grouped": replace(SOFTMAX, norm_topk_prob=False),
    "softmax-normalised": replace(SOFTMAX, n_group=1, topk_group=1),
    "softmax-over-chosen": replace(
        SOFTMAX,
        scoring=RouterScoring.SOFTMAX_OVER_CHOSEN,
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
    ),
}


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("bias_range", [(-4.0, -1.5), (-1.0, 1.0)])
def test_router_equals_the_plain_formula(name: str, bias_range: tuple[float, float]) -> None:
    moe = VARIANTS[name]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, moe.num_experts, generator=generator, dtype=torch.float64) * 2
    low, high = bias_range
    bias = torch.rand(moe.num_experts, generator=generator, dtype=torch.float64)
    bias = low + (high - low) * bias if moe.has_correction_bias else None
    topk_ids, topk_weights = route(logits, bias, moe)
    plain_bias = None if bias is None else bias.tolist()
    for row, ids, weights in zip(logits, topk_ids.tolist(), topk_weights.tolist(), strict=True):
        expected = plain_route(row.tolist(), plain_bias, moe).weights
        assert dict(zip(ids, weights, strict=True)) == pytest.approx(expected, abs=1e-12)


def test_masked_groups_are_never_chosen_with_negative_biases() -> None:
    """All biased scores are negative here: a mask of 0 would be the greatest of all."""
    logits = torch.zeros(1, 16, dtype=torch.float64)
    bias = torch.linspace(-4.0, -1.5, 16, dtype=torch.float64)
    topk_ids, _ = route(logits, bias, MOE)
    assert set(topk_ids[0].tolist()) == {12, 13, 14, 15}


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_routing_is_computed_in_float32_or_in_float64(
    dtype: torch.dtype, expected: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 8, generator=generator).to(dtype)
    hidden = torch.randn(5, 8, generator=generator).to(dtype)
    bias = torch.rand(16, generator=generator)
    topk_ids, topk_weights = Router(MOE, RouterWeights(weight, bias))(hidden)
    assert topk_weights.dtype == expected
    exact = hidden.to(expected) @ weight.to(expected).T
    assert torch.equal(topk_ids, route(exact, bias.to(expected), MOE)[0])


def test_a_missing_correction_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="has_correction_bias"):
        Router(MOE, RouterWeights(torch.zeros(16, 8), None))


def test_no_tokens_route_nowhere() -> None:
    topk_ids, topk_weights = route(torch.empty(0, 16), torch.zeros(16), MOE)
    assert topk_ids.shape == topk_weights.shape == (0, 4)
