"""What the sampler promises, one row and one token at a time, in Python floats.

Knows the formulas and their order; shares nothing with attn_service/sampler.py but the number
that a position draws.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from attn_service.sampler import uniform
from attn_service.sequence import Sampling


def edited(
    logits: Sequence[float], s: Sampling, prompt_ids: Sequence[int], output_ids: Sequence[int]
) -> list[float]:
    """Bias, repetition, frequency and presence penalty, then stop tokens before min_tokens."""
    counts, biases = Counter(output_ids), dict(s.logit_bias)
    values = []
    for token, logit in enumerate(logits):
        value = logit + biases.get(token, 0.0)
        if token in prompt_ids or token in output_ids:
            value = value / s.repetition_penalty if value > 0 else value * s.repetition_penalty
        value -= s.frequency_penalty * counts[token]
        value -= s.presence_penalty if token in counts else 0.0
        early = len(output_ids) < s.min_tokens and token in s.stop_token_ids
        values.append(-math.inf if early else value)
    return values


@dataclass(frozen=True)
class Kept:
    """Probabilities of the tokens that the filters keep, 0 for the others; `margin` is how far
    the filters were from deciding otherwise."""

    probabilities: list[float]
    margin: float


def kept(values: Sequence[float], s: Sampling) -> Kept:
    """Temperature, top_k, top_p, min_p, each on what the one before has kept; equals stay."""
    best = max(values)
    weights = [math.exp((value - best) / s.temperature) for value in values]
    ordered = sorted(weights, reverse=True)
    if s.top_k:
        ordered = ordered[: s.top_k]
    cut, margin = ordered[-1] if s.top_k else 0.0, 1.0
    if s.top_p < 1:
        total, reached = math.fsum(ordered), 0.0
        for weight in ordered:
            reached += weight
            margin = min(margin, abs(reached / total - s.top_p))
            if reached >= s.top_p * total:
                cut = weight
                break
    cut = max(cut, s.min_p)
    margin = min([margin, *(abs(weight - cut) for weight in weights if cut and weight != cut)])
    left = [weight if weight >= cut else 0.0 for weight in weights]
    return Kept([weight / math.fsum(left) for weight in left], margin)


def drawn(probabilities: Sequence[float], number: float) -> tuple[int, float]:
    """The token at which the sum in token order exceeds `number`, and how far from another."""
    reached, edges = 0.0, [0.0]
    for probability in probabilities:
        reached += probability
        edges.append(reached)
    margin = min(abs(number - edge) for edge in edges[1:-1])
    token = next(
        t for t in range(len(probabilities)) if edges[t + 1] > number or t == last(probabilities)
    )
    return token, margin


def last(probabilities: Sequence[float]) -> int:
    return max(token for token, probability in enumerate(probabilities) if probability > 0)


def next_token(
    logits: Sequence[float], s: Sampling, prompt_ids: Sequence[int], output_ids: Sequence[int]
) -> tuple[int, float]:
    """The next token, and how far the nearest decision was from another."""
    values = edited(logits, s, prompt_ids, output_ids)
    if s.temperature == 0:
        ordered = sorted(values, reverse=True)
        return values.index(ordered[0]), ordered[0] - ordered[1]
    found = kept(values, s)
    position = len(prompt_ids) + len(output_ids)
    token, margin = drawn(found.probabilities, uniform(s.seed, s.index, position))
    return token, min(margin, found.margin)
