"""Rotary position embedding: default and YaRN, rotating halves or interleaved pairs.

Knows angles and rotation; which part of a head is rotated is the caller's.
Formulas: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071) with the options that
transformers reads from `rope_parameters`.
"""

import math

import torch
from torch import Tensor

from moe_core.config.model import ModelConfig, RopeConfig
from moe_core.model.layers import precise_dtype


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """By how much attention is sharpened when positions are stretched by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotation_scale(rope: RopeConfig) -> float:
    """The factor on cos and sin ("attention_factor")."""
    if rope.rope_type == "default":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        over_all = yarn_mscale(rope.factor, rope.mscale_all_dim)
        return yarn_mscale(rope.factor, rope.mscale) / over_all
    return yarn_mscale(rope.factor)


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(head_dim); MLA with YaRN's mscale_all_dim multiplies by its mscale twice, once
    for the queries and once for the keys."""
    scale = 1 / math.sqrt(config.head_dim)
    rope = config.rope
    if config.mla is not None and rope.rope_type == "yarn" and rope.mscale_all_dim:
        scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale


def inverse_frequencies(rope: RopeConfig, dim: int, dtype: torch.dtype) -> Tensor:
    """Radians per position for each of the dim/2 rotated pairs, [dim / 2]."""
    periods = rope.rope_theta ** (torch.arange(0, dim, 2).to(dtype) / dim)  # [dim / 2]
    if rope.rope_type == "default":
        return 1.0 / periods
    kept = 1 - _yarn_ramp(rope, dim, dtype)  # 1: rotates often enough to be left alone
    return (1.0 / (rope.factor * periods)) * (1 - kept) + (1.0 / periods) * kept


def _yarn_ramp(rope: RopeConfig, dim: int, dtype: torch.dtype) -> Tensor:
    """0 where a pair turns more than beta_fast times over the trained length, 1 below
    beta_slow times, linear in the pair's index between. [dim / 2]"""

    def pair_with(turns: float) -> float:
        trained = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(trained) / (2 * math.log(rope.rope_theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(dim // 2).to(dtype) - low) / (high - low)).clamp(0, 1)


class Rotary:
    """A table of all positions' cos and sin; rotates in float32, or float64 in it."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        precise = precise_dtype(dtype)
        self._interleaved = config.rope.interleaved
        frequencies = inverse_frequencies(config.rope, config.rotary_dim, precise)
        positions = torch.arange(config.max_position_embeddings).to(precise)
        angles = positions[:, None] * frequencies  # [max_position_embeddings, rotary_dim / 2]
        table = torch.stack((angles.cos(), angles.sin()), dim=1) * rotation_scale(config.rope)
        self._table = table.to(device)  # [max_position_embeddings, 2, rotary_dim / 2]

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [n, heads, rotary_dim] turned to its positions [n].

        Interleaved pairs come out as halves: queries and keys alike, so that products stay.
        """
        cos, sin = self._table[positions].unsqueeze(2).unbind(1)  # [n, 1, rotary_dim / 2]
        if self._interleaved:
            first, second = x[..., 0::2], x[..., 1::2]
        else:
            first, second = x.chunk(2, dim=-1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat(turned, dim=-1).to(x.dtype)
