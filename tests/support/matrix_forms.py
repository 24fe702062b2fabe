"""The forms of matrices that this machine can multiply by, for tests to run over."""

import pytest
import torch

from moe_core.model.matrix_forms import MatrixForm, forms_here

_HERE = forms_here(torch.bfloat16, torch.device("cpu"))


def _needs(form: MatrixForm) -> pytest.MarkDecorator:
    return pytest.mark.skipif(form not in _HERE, reason=f"no {form} matrices on this machine")


needs_float16 = _needs(MatrixForm.FLOAT16)
ARRANGED = [
    pytest.param(form, marks=_needs(form)) for form in (MatrixForm.BLOCKED, MatrixForm.FLOAT16)
]
