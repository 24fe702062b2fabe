"""The MoE gate: which experts a token goes to, and with which weights.

Knows the formulas of the five families and that they are computed in float32 (float64 in a
float64 model). Knows logical experts only.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moe_core.config.model import GroupScore, MoeConfig, RouterScoring
from moe_core.model.layers import precise_dtype
from moe_core.model.weights import RouterWeights

# Keeps the normalisation of vanishing weights finite, as the published models have it.
_NORM_EPS = 1e-20


def route(router_logits: Tensor, bias: Tensor | None, moe: MoeConfig) -> tuple[Tensor, Tensor]:
    """router_logits [n, num_experts] to topk_ids [n, k] int64 and topk_weights [n, k].

    The bias [num_experts] decides the choice only; weights are gathered without it.
    """
    if moe.scoring is RouterScoring.SOFTMAX_OVER_CHOSEN:
        chosen, topk_ids = router_logits.topk(moe.num_experts_per_tok, dim=-1)
        return topk_ids, chosen.softmax(dim=-1)
    if moe.scoring is RouterScoring.SIGMOID:
        scores = router_logits.sigmoid()
    else:
        scores = router_logits.softmax(dim=-1)
    for_choice = scores if bias is None else scores + bias
    if moe.topk_group < moe.n_group:
        for_choice = _keep_best_groups(for_choice, moe)
    topk_ids = for_choice.topk(moe.num_experts_per_tok, dim=-1).indices
    weights = scores.gather(-1, topk_ids)  # [n, k]
    if moe.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + _NORM_EPS)
    return topk_ids, weights * moe.routed_scaling_factor


def _keep_best_groups(for_choice: Tensor, moe: MoeConfig) -> Tensor:
    """Masks every expert outside the topk_group best groups.

    With -inf: a biased score may be negative, and a mask of 0 would then be chosen.
    """
    grouped = for_choice.view(-1, moe.n_group, moe.experts_per_group)
    if moe.group_score is GroupScore.SUM_OF_TOP2:
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)  # [n, n_group]
    else:
        group_scores = grouped.amax(dim=-1)
    best = group_scores.topk(moe.topk_group, dim=-1).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, best, False)
    return grouped.masked_fill(dropped[..., None], float("-inf")).view_as(for_choice)


class Router:
    """One layer's gate; keeps its weight in the dtype it computes in."""

    def __init__(self, moe: MoeConfig, weights: RouterWeights) -> None:
        self._moe = moe
        dtype = precise_dtype(weights.weight.dtype)
        self._weight = weights.weight.to(dtype)  # [num_experts, hidden]
        bias = weights.e_score_correction_bias
        self._bias = None if bias is None else bias.to(dtype)
        if moe.has_correction_bias is not (bias is not None):
            raise ValueError(f"{moe.has_correction_bias=} but the weights disagree")

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states [n, hidden] to topk_ids [n, k] int64, topk_weights [n, k]."""
        logits = functional.linear(hidden_states.to(self._weight.dtype), self._weight)
        return route(logits, self._bias, self._moe)
