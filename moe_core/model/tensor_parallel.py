"""What the model needs from its attention TP group.

Knows the two collectives and no way to run them: gloo, NCCL or threads are the caller's.
Every rank of a group makes the same calls in the same order.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class TensorParallel(Protocol):
    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the group, the same bits on every rank. May overwrite and return `x`."""

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """The ranks' tensors joined along dim 0 in rank order; rank r brings sizes[r] rows."""


class NoTensorParallel:
    """A group of one."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        return x
