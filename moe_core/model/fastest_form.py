"""Which form of matrices is multiplied fastest here: measured when a process loads.

Knows how to time products. Knows no model.
"""

import time
from collections.abc import Callable, Sequence

import torch

from moe_core.model.linear import linear
from moe_core.model.matrix_forms import Matrix, MatrixForm, forms_here, in_form

_SIZE, _NUM_MATRICES, _ROUNDS = 1024, 8, 3
_ROW_COUNTS = (1, 4, 16)


def fastest_form(dtype: torch.dtype, device: torch.device) -> MatrixForm:
    """The form of least time summed over a few row counts of decoding. Takes a fraction of a
    second where there is a choice."""
    forms = forms_here(dtype, device)
    if len(forms) == 1:
        return forms[0]
    generator = torch.Generator().manual_seed(0)
    stored = [
        torch.randn(_SIZE, _SIZE, generator=generator).to(dtype) for _ in range(_NUM_MATRICES)
    ]
    seconds = {form: _trial([in_form(each, form) for each in stored], dtype) for form in forms}
    return min(forms, key=lambda form: seconds[form])


def _trial(matrices: Sequence[Matrix], dtype: torch.dtype) -> float:
    """Seconds."""
    inputs = [torch.ones(rows, _SIZE, dtype=dtype) for rows in _ROW_COUNTS]

    def once() -> None:
        for x in inputs:
            for matrix in matrices:
                linear(x, matrix)

    return min(_seconds(once) for _ in range(_ROUNDS))


def _seconds(action: Callable[[], None]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
