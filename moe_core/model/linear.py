"""How a matrix of weights is multiplied: as torch does it, or packed for CPUs that lack the units.

Knows matrices, two forms of them, and how to find out which is faster here. Knows no layer and no
checkpoint.

A CPU without bfloat16 instructions multiplies bfloat16 matrices a row at a time, so 16 rows cost
16 times what one does. FBGEMM multiplies float32 rows by float16 weights, which it widens in
registers: the two bytes a value that bfloat16 has, for many rows as for one, and float32 sums.

Invariant: a packed matrix holds exactly the values that it was made from. A power of two moves them
into float16's range, whose fraction is wider than bfloat16's; a matrix of which any value would
change all the same stays plain.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_TOP_EXPONENT = 15  # of float16: largest values below 2 ** 16
_TRIAL_SIZE, _TRIAL_MATRICES, _TRIAL_ROUNDS = 1024, 8, 3
_TRIAL_ROWS = (1, 4, 16)


class PackedMatrix:
    """[out_features, in_features] in FBGEMM's form; see `pack`."""

    __slots__ = ("_packed", "_unscale", "shape", "unscale")

    def __init__(self, packed: Any, unscale: float, shape: torch.Size) -> None:  # noqa: ANN401
        self._packed = packed
        self.unscale = unscale
        self._unscale = torch.tensor(unscale)  # torch would make one of a float each time
        self.shape = shape

    def multiply(self, x: Tensor) -> Tensor:
        """x [n, in_features] to [n, out_features], in x's dtype; computed in float32."""
        return self.scaled_product(x).mul_(self._unscale).to(x.dtype)

    def scaled_product(self, x: Tensor) -> Tensor:
        """`multiply` in float32, before it is multiplied by `unscale`."""
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), self._packed)
        return product

    def values(self) -> Tensor:
        """[out_features, in_features] float32, exactly what was packed."""
        scaled: Tensor = torch.ops.quantized.linear_unpack_fp16(self._packed)[0]
        return scaled.float().mul_(self.unscale)


Matrix = Tensor | PackedMatrix


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """x [n, in_features] to [n, out_features], in x's dtype."""
    if isinstance(weight, Tensor):
        if weight.dtype == x.dtype:
            return functional.linear(x, weight, bias)
        return functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
    product = weight.multiply(x)
    return product if bias is None else product + bias


def linear_each(parts: Sequence[Tensor], matrices: Sequence[Matrix]) -> Tensor:
    """Each part [n_i, in_features] times its own matrix: [Σ n_i, out_features], in the parts'
    dtype, float32 where any matrix is packed.

    With few rows a part the products are short, and what is done to each of them costs as much: so
    that is done once for all.
    """
    packed = [matrix for matrix in matrices if isinstance(matrix, PackedMatrix)]
    if len(packed) < len(matrices):
        wide = [x.float() for x in parts] if packed else parts
        return _joined([linear(x, each) for x, each in zip(wide, matrices, strict=True)])
    product = _joined([each.scaled_product(x) for x, each in zip(parts, packed, strict=True)])
    unscale = [each.unscale for x, each in zip(parts, packed, strict=True) for _ in range(len(x))]
    return product.mul_(torch.tensor(unscale)[:, None])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def values_of(weight: Matrix) -> Tensor:
    """The matrix as a tensor: its own dtype where it is plain, float32 where it is packed."""
    return weight if isinstance(weight, Tensor) else weight.values()


def pack(weight: Tensor) -> Matrix:
    """`weight` [out_features, in_features] packed, or as it is where that would change a value."""
    wide = weight.float()
    largest = wide.abs().max().item() if wide.numel() else 0.0
    if not math.isfinite(largest) or largest == 0.0:
        return weight
    exponent = _TOP_EXPONENT - math.frexp(largest)[1]
    wide.mul_(2.0**exponent)
    if not torch.equal(wide.half().float(), wide):
        return weight
    packed = torch.ops.quantized.linear_prepack_fp16(wide, None)
    return PackedMatrix(packed, 2.0**-exponent, weight.shape)


def packing_pays(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrices of `dtype` are multiplied faster packed, here and now: the sum of the times
    for a few row counts of decoding, measured. Takes a fraction of a second."""
    if device.type != "cpu" or dtype is not torch.bfloat16 or not _can_pack():
        return False
    generator = torch.Generator().manual_seed(0)
    shape = (_TRIAL_SIZE, _TRIAL_SIZE)
    plain = [torch.randn(shape, generator=generator).to(dtype) for _ in range(_TRIAL_MATRICES)]
    packed = [pack(weight) for weight in plain]
    return _trial(packed, dtype) < _trial(plain, dtype)


def _can_pack() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


def _trial(matrices: Sequence[Matrix], dtype: torch.dtype) -> float:
    """Seconds."""
    inputs = [torch.ones(rows, _TRIAL_SIZE, dtype=dtype) for rows in _TRIAL_ROWS]

    def once() -> None:
        for x in inputs:
            for matrix in matrices:
                linear(x, matrix)

    return min(_seconds(once) for _ in range(_TRIAL_ROUNDS))


def _seconds(action: Callable[[], None]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def activation_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which activations of a model of `dtype` are kept and multiplied with each other: float32
    for bfloat16 on a CPU that has no instructions for it, else `dtype` itself. What is cached and
    what is sent to the experts is of `dtype` all the same."""
    if dtype is not torch.bfloat16 or device.type != "cpu":
        return dtype
    native: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype if native else torch.float32
