"""Matrices in every form hold what they were made from, and multiply like plain ones."""

import pytest
import torch

from moe_core.model.fastest_form import _ROW_COUNTS, fastest_form
from moe_core.model.linear import activation_dtype, linear
from moe_core.model.matrix_forms import Matrix, MatrixForm, forms_here, in_form, values_of
from moe_core.model.weight_forms import expert_in_form
from moe_core.model.weights import ExpertWeights
from support.matrix_forms import ARRANGED, needs_float16

CPU = torch.device("cpu")


def drawn(*shape: int, seed: int = 0, scale: float = 0.03) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(torch.bfloat16)


@pytest.mark.parametrize("form", ARRANGED)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 0.03, 1.0, 300.0, 1e30])
def test_a_matrix_in_a_form_holds_exactly_the_values_it_was_made_from(
    form: MatrixForm, scale: float
):
    weight = drawn(24, 40, scale=scale)
    arranged = in_form(weight, form)
    assert not isinstance(arranged, torch.Tensor)
    assert arranged.shape == weight.shape
    assert torch.equal(values_of(arranged).float(), weight.float())
    assert in_form(arranged, form) is arranged


@needs_float16
@pytest.mark.parametrize(
    "weight",
    [
        drawn(8, 16).index_fill_(1, torch.tensor([3]), 1e-20),  # not in the range of the others
        torch.randn(8, 16),  # float32 has more digits than float16
        torch.zeros(8, 16, dtype=torch.bfloat16),
        torch.full((8, 16), float("inf"), dtype=torch.bfloat16),
    ],
    ids=["too wide a range", "float32", "zeros", "infinite"],
)
def test_a_matrix_that_float16_would_change_stays_plain(weight: torch.Tensor):
    assert in_form(weight, MatrixForm.FLOAT16) is weight


@pytest.mark.parametrize("form", MatrixForm)
def test_an_empty_matrix_stays_plain_in_every_form(form: MatrixForm):
    weight = torch.empty(0, 16, dtype=torch.bfloat16)
    assert in_form(weight, form) is weight


@pytest.mark.parametrize("form", ARRANGED)
@pytest.mark.parametrize("num_rows", [0, 1, 5, 33])
@pytest.mark.parametrize("shape", [(24, 40), (17, 5), (1, 64)])
def test_a_product_is_the_float32_product(form: MatrixForm, num_rows: int, shape: tuple[int, int]):
    weight = drawn(*shape)
    bias = drawn(shape[0], seed=1)
    x = drawn(shape[1], num_rows, seed=2, scale=1.0).t()  # not contiguous
    wanted = x.float() @ weight.float().t()
    arranged = in_form(weight, form)
    product = linear(x, arranged, bias)
    assert product.dtype is torch.bfloat16
    torch.testing.assert_close(product, wanted.to(torch.bfloat16) + bias, rtol=1e-2, atol=4e-3)
    wide = linear(x.float(), arranged)
    assert wide.dtype is torch.float32
    tolerance = (1e-5, 1e-6) if form is MatrixForm.FLOAT16 else (1e-2, 1e-3)
    torch.testing.assert_close(wide, wanted, rtol=tolerance[0], atol=tolerance[1])


@needs_float16
def test_an_expert_keeps_a_matrix_plain_that_its_form_would_change():
    expert = ExpertWeights(drawn(2 * 8, 16), drawn(16, 8))
    expert.w13[0, 0] = 1e-20
    arranged = expert_in_form(expert, MatrixForm.FLOAT16)
    assert arranged.w13 is expert.w13
    assert not isinstance(arranged.w2, torch.Tensor)
    assert torch.equal(values_of(arranged.w2), expert.w2.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_bfloat16_is_ever_arranged_or_widened(dtype: torch.dtype):
    assert fastest_form(dtype, CPU) is MatrixForm.PLAIN
    assert activation_dtype(dtype, CPU) is dtype


def test_matrices_of_other_devices_stay_plain():
    assert forms_here(torch.bfloat16, torch.device("cuda")) == (MatrixForm.PLAIN,)


@pytest.mark.parametrize("fastest", forms_here(torch.bfloat16, CPU))
def test_the_fastest_form_is_chosen(monkeypatch: pytest.MonkeyPatch, fastest: MatrixForm):
    kind = type(in_form(drawn(2, 2), fastest))

    def trial(matrices: list[Matrix], dtype: torch.dtype) -> float:
        return 1.0 if type(matrices[0]) is kind else 2.0

    monkeypatch.setattr("moe_core.model.fastest_form._trial", trial)
    assert fastest_form(torch.bfloat16, CPU) is fastest


def test_every_form_is_timed_with_every_row_count(monkeypatch: pytest.MonkeyPatch):
    timed: set[tuple[type, int]] = set()

    def noted(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        timed.add((type(matrix), len(x)))
        return linear(x, matrix)

    monkeypatch.setattr("moe_core.model.fastest_form._SIZE", 64)
    monkeypatch.setattr("moe_core.model.fastest_form.linear", noted)
    fastest_form(torch.bfloat16, CPU)
    forms = forms_here(torch.bfloat16, CPU)
    kinds = {type(in_form(drawn(2, 2), form)) for form in forms}
    wanted = {(kind, rows) for kind in kinds for rows in _ROW_COUNTS} if len(forms) > 1 else set()
    assert timed == wanted
