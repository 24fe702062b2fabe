"""Tensors of a checkpoint as torch tensors of the process's dtype, on its device.

Knows types, FP8 and the check for values that are no numbers; knows no model.
"""

from dataclasses import dataclass

import numpy as np
import torch

from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.fp8 import dequantise
from moe_core.checkpoint.headers import TensorEntry
from moe_core.checkpoint.names import SCALE_SUFFIX
from moe_core.checkpoint.reader import TensorReader
from moe_core.errors import CheckpointError, ConfigError

Tensor = torch.Tensor
_TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True)
class Cut:
    """Indices start … stop-1 of dimension `axis`."""

    axis: int
    start: int
    stop: int


def even_cut(axis: int, length: int, rank: int, size: int, what: str) -> Cut:
    """Rank's share of a dimension. Raises ConfigError where `size` ranks do not divide it."""
    if length % size:
        raise ConfigError(f"{what} ranks", size, f"must divide {length}")
    part = length // size
    return Cut(axis, rank * part, (rank + 1) * part)


class TensorSource:
    """Reads, dequantises, converts and checks one tensor after another."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        reader: TensorReader,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self._checkpoint = checkpoint
        self._reader = reader

    def load(
        self,
        name: str,
        cut: Cut | None = None,
        *,
        expert: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """A tensor, or its slice `cut`; with `expert`, of that row of its first dimension.

        Raises CheckpointError where it does not match the manifest or holds NaN or infinity,
        also after conversion.
        """
        entry = self._checkpoint.tensors[name]
        entry = entry if expert is None else entry.at(expert)
        cut = cut or Cut(0, 0, entry.shape[0])
        wanted = dtype or self.dtype
        values = self._values(entry, cut)
        if values.dtype == torch.float8_e4m3fn:
            values = self._dequantised(entry, cut, values, wanted)
        values = values.to(wanted)
        _check_finite(values, entry)
        return values.to(self.device)

    def _values(self, entry: TensorEntry, cut: Cut) -> Tensor:
        content = self._reader.read(entry, cut.axis, cut.start, cut.stop)
        shape = list(entry.shape)
        shape[cut.axis] = cut.stop - cut.start
        flat = torch.from_numpy(np.ascontiguousarray(content).reshape(-1))
        return flat.view(_TORCH_DTYPES[entry.dtype]).view(shape)

    def _dequantised(
        self, entry: TensorEntry, cut: Cut, weight: Tensor, dtype: torch.dtype
    ) -> Tensor:
        scale_entry = self._checkpoint.tensors[entry.name + SCALE_SUFFIX]
        scale = self._values(scale_entry, Cut(0, 0, scale_entry.shape[0]))
        _check_finite(scale, scale_entry)
        first_row, first_column = (cut.start if cut.axis == axis else 0 for axis in (0, 1))
        return dequantise(
            weight, scale, first_row=first_row, first_column=first_column, dtype=dtype
        )


def _check_finite(values: Tensor, entry: TensorEntry) -> None:
    """aminmax hands a NaN on, so the two ends tell of all values in one pass."""
    if values.numel() == 0:
        return
    low, high = torch.aminmax(values)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        kind = "NaN" if torch.isnan(low) or torch.isnan(high) else "infinity"
        raise CheckpointError(
            f"{entry}: holds {kind} as {str(values.dtype).removeprefix('torch.')}"
        )
