"""The routers of DESIGN section 9, one token at a time in plain Python numbers.

The oracle for moe_core.model.router, and the judge of whether a token's routing is near a tie.
Knows neither tensors' shapes beyond one row nor how the model computes it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moe_core.config.model import GroupScore, MoeConfig, RouterScoring


@dataclass(frozen=True, slots=True)
class PlainChoice:
    """weights by expert, and by how much the choice would have to be wrong to differ."""

    weights: dict[int, float]
    margin: float


def plain_route(
    logits: Sequence[float], bias: Sequence[float] | None, moe: MoeConfig
) -> PlainChoice:
    if moe.scoring is RouterScoring.SIGMOID:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        exps = [math.exp(x - max(logits)) for x in logits]
        scores = [e / sum(exps) for e in exps]
    for_choice = [s + b for s, b in zip(scores, bias or [0.0] * len(scores), strict=True)]
    size = len(scores) // moe.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(moe.n_group)]
    kept_groups, group_margin = _best(
        {g: _group_score([for_choice[e] for e in groups[g]], moe) for g in range(moe.n_group)},
        moe.topk_group,
    )
    candidates = {e: for_choice[e] for g in kept_groups for e in groups[g]}
    chosen, margin = _best(candidates, moe.num_experts_per_tok)
    weights = {e: scores[e] for e in chosen}
    if moe.norm_topk_prob or moe.scoring is RouterScoring.SOFTMAX_OVER_CHOSEN:
        weights = {e: w / sum(scores[c] for c in chosen) for e, w in weights.items()}
    scaled = {e: w * moe.routed_scaling_factor for e, w in weights.items()}
    return PlainChoice(scaled, min(margin, group_margin))


def _group_score(values: list[float], moe: MoeConfig) -> float:
    count = 2 if moe.group_score is GroupScore.SUM_OF_TOP2 else 1
    return sum(sorted(values, reverse=True)[:count])


def _best(scores: dict[int, float], count: int) -> tuple[list[int], float]:
    order = sorted(scores, key=lambda key: -scores[key])
    margin = math.inf if count == len(order) else scores[order[count - 1]] - scores[order[count]]
    return order[:count], margin
