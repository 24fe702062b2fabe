"""The grouped expert kernel against the loop that defines it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_core.model.experts import NO_EXPERT, run_experts, run_experts_by_loop
from moe_core.model.matrix_forms import MatrixForm
from moe_core.model.weight_forms import expert_in_form, mlp_in_form
from moe_core.model.weights import ExpertLayerWeights, ExpertWeights, MlpWeights
from support.matrix_forms import ARRANGED
from support.patience import patient

HIDDEN, WIDTH = 16, 12
# bfloat16: products are rounded to 8 bits, and a matrix of one row may be summed otherwise.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make_weights(num_experts: int, dtype: torch.dtype, shared: bool = True) -> ExpertLayerWeights:
    generator = torch.Generator().manual_seed(7)

    def matrix(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (values / shape[-1] ** 0.5).to(dtype)

    mlp = MlpWeights(matrix(WIDTH, HIDDEN), matrix(WIDTH, HIDDEN), matrix(HIDDEN, WIDTH))
    return ExpertLayerWeights(
        w13=matrix(num_experts, 2 * WIDTH, HIDDEN),
        w2=matrix(num_experts, HIDDEN, WIDTH),
        shared=mlp if shared else None,
    )


def make_batch(local_ids: list[list[int]], columns: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    ids = torch.tensor(local_ids, dtype=torch.int64).view(-1, columns)
    hidden = torch.randn(ids.shape[0], HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.rand(ids.shape, generator=generator, dtype=torch.float32)
    return [hidden, ids, weights]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@patient
@given(data=st.data())
def test_grouped_equals_loop(dtype: torch.dtype, data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(0, 6))
    columns = data.draw(st.integers(1, 4))
    row = st.lists(st.integers(NO_EXPERT, num_experts), min_size=columns, max_size=columns)
    batch = make_batch(data.draw(st.lists(row, max_size=12)), columns, dtype)
    weights = make_weights(num_experts, dtype)
    expected = run_experts_by_loop(weights, *batch)
    actual = run_experts(weights, *batch)
    assert actual.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def arranged(weights: ExpertLayerWeights, form: MatrixForm) -> ExpertLayerWeights:
    pairs = zip(weights.w13, weights.w2, strict=True)
    experts = [expert_in_form(ExpertWeights(w13, w2), form) for w13, w2 in pairs]
    shared = weights.shared and mlp_in_form(weights.shared, form)
    return ExpertLayerWeights([e.w13 for e in experts], [e.w2 for e in experts], shared)


@pytest.mark.parametrize("form", ARRANGED)
@pytest.mark.parametrize("odd_one", [False, True])
def test_arranged_experts_equal_the_loop_over_plain_ones(form: MatrixForm, odd_one: bool) -> None:
    weights = make_weights(5, torch.bfloat16)
    if odd_one:
        weights.w13[0, 0, 0] = 1e-20  # which float16 would change
    batch = make_batch([[0, 5, 3], [4, NO_EXPERT, 1], [2, 0, 5]], 3, torch.bfloat16)
    expected = run_experts_by_loop(weights, *batch)
    tolerance = TOLERANCE[torch.bfloat16]
    held = arranged(weights, form)
    assert isinstance(held.w13[0], Tensor) == (odd_one and form is MatrixForm.FLOAT16)
    actual = run_experts(held, *batch)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_one_expert_is_the_gated_mlp_of_its_weights() -> None:
    weights = make_weights(2, torch.float64)
    hidden, ids, _ = make_batch([[1]], 1, torch.float64)
    gate_up = weights.w13[1] @ hidden[0]
    gate, up = gate_up[:WIDTH], gate_up[WIDTH:]
    expected = weights.w2[1] @ (gate * torch.sigmoid(gate) * up)
    actual = run_experts(weights, hidden, ids, torch.ones(1, 1))
    torch.testing.assert_close(actual[0], expected, rtol=1e-13, atol=1e-13)


def test_bfloat16_partials_are_summed_in_float32() -> None:
    """In bfloat16 1 + 8 · 2⁻⁹ stays 1, each addend being lost; the sum is 1 + 2⁻⁶."""
    identity = torch.eye(HIDDEN, dtype=torch.bfloat16)
    w13 = torch.cat((identity, identity)).expand(9, -1, -1).clone()
    weights = ExpertLayerWeights(w13, identity.expand(9, -1, -1).clone(), None)
    hidden = torch.full((1, HIDDEN), 2.0, dtype=torch.bfloat16)
    ids = torch.arange(9)[None]
    scale = torch.tensor([[1.0] + [2.0**-9] * 8])
    one = run_experts(weights, hidden, ids[:, :1], scale[:, :1])
    total = run_experts(weights, hidden, ids, scale)
    torch.testing.assert_close(total.float(), (one.float() * (1 + 2.0**-6)), rtol=2**-8, atol=0)
    assert bool((total > one).all())


@pytest.mark.parametrize("local_id", [2, 3, -2])
def test_an_expert_that_is_not_held_is_refused(local_id: int) -> None:
    weights = make_weights(2, torch.float32, shared=False)
    with pytest.raises((ValueError, RuntimeError)):
        run_experts(weights, *make_batch([[local_id]], 1, torch.float32))
