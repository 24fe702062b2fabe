"""Rows times matrices of weights in any form, and in which dtype what lies between is computed.

Knows products. Knows no layer and no checkpoint.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moe_core.model.matrix_forms import Float16Matrix, Matrix, cpu_has_bfloat16


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """x [n, in_features] to [n, out_features], in x's dtype."""
    if not isinstance(weight, Tensor):
        return weight.multiply(x, bias)
    return functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def linear_each(parts: Sequence[Tensor], matrices: Sequence[Matrix]) -> Tensor:
    """Each part [n_i, in_features] times its own matrix: [Σ n_i, out_features], in the parts'
    dtype, float32 where any matrix is in float16.

    With few rows a part the products are short, and what is done to each of them costs as much: so
    that is done once for all.
    """
    packed = [matrix for matrix in matrices if isinstance(matrix, Float16Matrix)]
    if len(packed) < len(matrices):
        wide = [x.float() for x in parts] if packed else parts
        return _joined([linear(x, each) for x, each in zip(wide, matrices, strict=True)])
    product = _joined([each.scaled_product(x) for x, each in zip(parts, packed, strict=True)])
    unscale = [each.unscale for x, each in zip(parts, packed, strict=True) for _ in range(len(x))]
    return product.mul_(torch.tensor(unscale)[:, None])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def activation_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which activations of a model of `dtype` are kept and multiplied with each other: float32
    for bfloat16 on a CPU that has no instructions for it, else `dtype` itself. What is cached and
    what is sent to the experts is of `dtype` all the same."""
    if dtype is not torch.bfloat16 or device.type != "cpu" or cpu_has_bfloat16():
        return dtype
    return torch.float32
