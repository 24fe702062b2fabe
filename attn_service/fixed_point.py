"""Weights of tokens as whole numbers, so that their sums do not depend on the order of adding.

A float sum differs with the batch shape, the number of threads and the device, and then a token
at the edge of a nucleus, or a draw at the edge of two tokens, differs too. Whole numbers add up
to the same in any order.

Knows weights, relative to 1.0 for the likeliest token; nothing of how they came about.
"""

import torch

Tensor = torch.Tensor

# A weight below 2^-40 of the likeliest token's counts as none. 2^23 tokens of weight 1 still fit
# into an int64.
ONE = 2.0**40


def fixed(weights: Tensor) -> Tensor:
    """float32 weights from 0 to 1 -> int64 multiples of 1/ONE, rounded down, which is monotonic
    and, since ONE is a power of two, exact above 2^-17."""
    return (weights * ONE).long()


def column(values: list[float] | list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One number per row, [m, 1]."""
    return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)
