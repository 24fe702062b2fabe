"""In which form a process keeps a matrix of weights: as it is stored, or arranged for a kernel.

Knows single matrices, their forms and that no form changes a value. Knows neither which form is
fastest here (fastest_form.py) nor any layer.

A CPU with bfloat16 instructions multiplies fastest by blocks that oneDNN has laid out beforehand:
the plain product lays them out at every call. One without them multiplies bfloat16 matrices a row
at a time, so 16 rows cost 16 times what one does. FBGEMM multiplies float32 rows by float16
weights, which it widens in registers: the two bytes a value that bfloat16 has, for many rows as
for one, and float32 sums.

Invariant: a matrix in any form holds exactly the values that it was made from. For float16 a power
of two moves them into its range, whose fraction is wider than bfloat16's; a matrix of which any
value would change all the same stays plain.
"""

import math
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

_TOP_EXPONENT = 15  # of float16: largest values below 2 ** 16
_BLOCKED_FOR_ROWS = 16  # what oneDNN arranges for; other counts are hardly slower


class MatrixForm(StrEnum):
    PLAIN = "plain"
    BLOCKED = "blocked"  # oneDNN's, in the stored dtype
    FLOAT16 = "float16"  # FBGEMM's


class BlockedMatrix:
    """[out_features, in_features] bfloat16 as oneDNN arranges it."""

    __slots__ = ("_blocks", "shape")

    def __init__(self, weight: Tensor) -> None:
        self._blocks = torch.ops.mkldnn._reorder_linear_weight(weight, _BLOCKED_FOR_ROWS)
        self.shape = weight.shape

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [n, in_features] to [n, out_features], in x's dtype; rounded to bfloat16."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(torch.bfloat16), self._blocks, bias, "none", [], ""
        )
        return product.to(x.dtype)

    def values(self) -> Tensor:
        """[out_features, in_features] bfloat16, exactly what was arranged."""
        dense: Tensor = self._blocks.to_dense()
        return dense


class Float16Matrix:
    """[out_features, in_features] in FBGEMM's form."""

    __slots__ = ("_packed", "_unscale", "shape", "unscale")

    def __init__(self, packed: Any, unscale: float, shape: torch.Size) -> None:  # noqa: ANN401
        self._packed = packed
        self.unscale = unscale
        self._unscale = torch.tensor(unscale)  # torch would make one of a float each time
        self.shape = shape

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [n, in_features] to [n, out_features], in x's dtype; computed in float32."""
        product = self.scaled_product(x).mul_(self._unscale).to(x.dtype)
        return product if bias is None else product + bias

    def scaled_product(self, x: Tensor) -> Tensor:
        """`multiply` in float32, before it is multiplied by `unscale`."""
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), self._packed)
        return product

    def values(self) -> Tensor:
        """[out_features, in_features] float32, exactly what was packed."""
        scaled: Tensor = torch.ops.quantized.linear_unpack_fp16(self._packed)[0]
        return scaled.float().mul_(self.unscale)


Matrix = Tensor | BlockedMatrix | Float16Matrix


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for it."""
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


def forms_here(dtype: torch.dtype, device: torch.device) -> tuple[MatrixForm, ...]:
    """Those that this torch can multiply by, plain first."""
    forms = [MatrixForm.PLAIN]
    if device.type == "cpu" and dtype is torch.bfloat16:
        if cpu_has_bfloat16():
            forms.append(MatrixForm.BLOCKED)
        if "fbgemm" in torch.backends.quantized.supported_engines:
            forms.append(MatrixForm.FLOAT16)
    return tuple(forms)


def in_form(weight: Matrix, form: MatrixForm) -> Matrix:
    """`weight` [out_features, in_features] in `form`, or as it is where that has been done to it,
    would change a value, or has nothing to arrange."""
    if not isinstance(weight, Tensor) or form is MatrixForm.PLAIN or weight.numel() == 0:
        return weight
    return BlockedMatrix(weight) if form is MatrixForm.BLOCKED else _in_float16(weight)


def values_of(weight: Matrix) -> Tensor:
    """The matrix as a tensor: float32 where its form is float16, else in its own dtype."""
    return weight if isinstance(weight, Tensor) else weight.values()


def _in_float16(weight: Tensor) -> Matrix:
    wide = weight.float()
    largest = wide.abs().max().item()
    if not math.isfinite(largest) or largest == 0.0:
        return weight
    exponent = _TOP_EXPONENT - math.frexp(largest)[1]
    wide.mul_(2.0**exponent)
    if not torch.equal(wide.half().float(), wide):
        return weight
    packed = torch.ops.quantized.linear_prepack_fp16(wide, None)
    return Float16Matrix(packed, 2.0**-exponent, weight.shape)
