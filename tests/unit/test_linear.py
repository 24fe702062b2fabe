"""Packed matrices hold what they were made from, and multiply like plain ones."""

import pytest
import torch

from moe_core.model.linear import (
    _TRIAL_SIZE,
    Matrix,
    PackedMatrix,
    _trial,
    activation_dtype,
    linear,
    pack,
    packing_pays,
    values_of,
)
from moe_core.model.packing import packed_expert
from moe_core.model.weights import ExpertWeights

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines,
    reason="this torch has no fbgemm: matrices are never packed",
)


def drawn(*shape: int, seed: int = 0, scale: float = 0.03) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(torch.bfloat16)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 0.03, 1.0, 300.0, 1e30])
def test_a_packed_matrix_holds_exactly_the_values_it_was_made_from(scale: float):
    weight = drawn(24, 40, scale=scale)
    packed = pack(weight)
    assert isinstance(packed, PackedMatrix)
    assert packed.shape == weight.shape
    assert torch.equal(values_of(packed), weight.float())


@pytest.mark.parametrize(
    "weight",
    [
        drawn(8, 16).index_fill_(1, torch.tensor([3]), 1e-20),  # not in the range of the others
        torch.randn(8, 16),  # float32 has more digits than float16
        torch.zeros(8, 16, dtype=torch.bfloat16),
        torch.full((8, 16), float("inf"), dtype=torch.bfloat16),
        torch.empty(0, 16, dtype=torch.bfloat16),
    ],
    ids=["too wide a range", "float32", "zeros", "infinite", "empty"],
)
def test_a_matrix_that_packing_would_change_stays_plain(weight: torch.Tensor):
    assert pack(weight) is weight


@pytest.mark.parametrize("num_rows", [0, 1, 5, 33])
@pytest.mark.parametrize("shape", [(24, 40), (17, 5), (1, 64)])
def test_a_packed_product_is_the_float32_product(num_rows: int, shape: tuple[int, int]):
    weight = drawn(*shape)
    bias = drawn(shape[0], seed=1)
    x = drawn(shape[1], num_rows, seed=2, scale=1.0).t()  # not contiguous
    wanted = x.float() @ weight.float().t()
    packed = pack(weight)
    torch.testing.assert_close(linear(x.float(), packed), wanted, rtol=1e-5, atol=1e-6)
    product = linear(x, packed, bias)
    assert product.dtype is torch.bfloat16
    torch.testing.assert_close(product, wanted.to(torch.bfloat16) + bias, rtol=1e-2, atol=1e-3)


def test_packing_an_expert_keeps_its_values():
    expert = ExpertWeights(drawn(2 * 8, 16), drawn(16, 8))
    expert.w13[0, 0] = 1e-20  # one that stays plain
    packed = packed_expert(expert)
    assert packed.w13 is expert.w13
    assert isinstance(packed.w2, PackedMatrix)
    assert torch.equal(values_of(packed.w2), expert.w2.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_bfloat16_is_ever_packed_or_widened(dtype: torch.dtype):
    assert not packing_pays(dtype, CPU)
    assert activation_dtype(dtype, CPU) is dtype


@pytest.mark.parametrize(("packed_s", "plain_s"), [(1.0, 2.0), (2.0, 1.0)])
def test_the_faster_form_is_chosen(
    monkeypatch: pytest.MonkeyPatch, packed_s: float, plain_s: float
):
    def trial(matrices: list[Matrix], dtype: torch.dtype) -> float:
        return packed_s if isinstance(matrices[0], PackedMatrix) else plain_s

    monkeypatch.setattr("moe_core.model.linear._trial", trial)
    assert packing_pays(torch.bfloat16, CPU) is (packed_s < plain_s)
    assert not packing_pays(torch.bfloat16, torch.device("cuda"))


def test_both_forms_can_be_timed():
    weight = drawn(_TRIAL_SIZE, _TRIAL_SIZE)
    assert _trial([weight], torch.bfloat16) > 0
    assert _trial([pack(weight)], torch.bfloat16) > 0
