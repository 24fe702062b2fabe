"""FP8 weights with one scale per 128×128 block, as DeepSeek-V3 publishes them.

`value = float(weight) * weight_scale_inv[row // 128, column // 128]`, from the `weight_dequant`
of DeepSeek-V3's published inference code. Knows tensors; knows no files.
"""

import torch

from moe_core.config.parallel_rules import FP8_BLOCK

Tensor = torch.Tensor


def dequantise(
    weight: Tensor, scale_inv: Tensor, *, first_row: int, first_column: int, dtype: torch.dtype
) -> Tensor:
    """A slice of an FP8 weight in `dtype`; multiplied in float32, or float64 where asked for.

    weight [rows, columns] float8_e4m3fn begins at (first_row, first_column) of its tensor;
    scale_inv [⌈all rows / 128⌉, ⌈all columns / 128⌉] belongs to the whole tensor.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    rows = (first_row + torch.arange(weight.shape[0])) // FP8_BLOCK
    columns = (first_column + torch.arange(weight.shape[1])) // FP8_BLOCK
    scales = scale_inv.to(exact)[rows][:, columns]  # [rows, columns]
    return scales.mul_(weight.to(exact)).to(dtype)
