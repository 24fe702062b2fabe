"""FP8 block-scaled checkpoints in the form in which DeepSeek-V3 is published."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.fp8 import dequantise
from moe_core.errors import CheckpointError
from moe_core.model.weights import MlaWeights
from support.checkpoint_files import (
    Json,
    Tensors,
    deepseek_config,
    edit_tensors,
    load_attention,
    load_experts,
    random_tensors,
    specs,
    write_checkpoint,
)

BLOCK = 128
PROJECTION = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
CONFIG: Json = deepseek_config(
    hidden_size=192,  # one and a half blocks
    intermediate_size=512,
    moe_intermediate_size=256,
    n_routed_experts=4,
    kv_lora_rank=144,  # with the 4 rotary dimensions: blocks of 128 and 20 rows
    quantization_config={
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    },
    torch_dtype="bfloat16",
)


def by_element(weight: Tensor, scale: Tensor) -> Tensor:
    """The definition, one value at a time, in float64."""
    values = weight.double()
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            values[row, column] *= scale[row // BLOCK, column // BLOCK].double()
    return values


def block_values(weight: Tensor, scale: Tensor) -> Tensor:
    rows, columns = weight.shape
    wide = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return weight.float() * wide


def quantised(config: Json) -> tuple[Tensors, Tensors]:
    """(as published, the values that they stand for in float32)."""
    generator = torch.Generator().manual_seed(1)
    plain = random_tensors(config, torch.bfloat16)
    stored, meant = dict(plain), {name: tensor.float() for name, tensor in plain.items()}
    for name, spec in specs(config).items():
        if not spec.linear:
            continue
        blocks = [-(-size // BLOCK) for size in spec.shape]
        stored[name] = plain[name].to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = torch.rand(blocks, generator=generator) + 0.5
        meant[name] = block_values(stored[name], stored[f"{name}_scale_inv"])
    return stored, meant


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    stored, meant = quantised(CONFIG)
    return write_checkpoint(tmp_path_factory.mktemp("fp8"), CONFIG, stored, num_files=2), meant


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 300), columns=st.integers(1, 300), seed=st.integers(0, 99), data=st.data()
)
def test_any_slice_dequantises_as_the_whole_does(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // BLOCK), -(-columns // BLOCK), generator=generator) + 0.5
    first_row = data.draw(st.integers(0, rows - 1))
    first_column = data.draw(st.integers(0, columns - 1))
    part = weight[first_row:, first_column:]
    values = dequantise(
        part, scale, first_row=first_row, first_column=first_column, dtype=torch.float32
    )
    assert torch.equal(values, block_values(weight, scale)[first_row:, first_column:])


def test_float64_is_the_exact_product() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(130, 140, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, generator=generator)
    values = dequantise(weight, scale, first_row=0, first_column=0, dtype=torch.float64)
    assert torch.equal(values, by_element(weight, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_attention_ranks_load_the_values_that_blocks_stand_for(
    published: tuple[Path, Tensors], tp: int, dtype: torch.dtype
) -> None:
    directory, meant = published
    checkpoint = Checkpoint.open(directory)
    parts = [load_attention(checkpoint, rank, tp, dtype=dtype).layers[1] for rank in range(tp)]
    stem = "model.layers.1.self_attn"
    for name, dim in (("q_b_proj", 0), ("kv_b_proj", 0), ("o_proj", 1)):
        whole = torch.cat([getattr(part.attention, name) for part in parts], dim)
        assert torch.equal(whole, meant[f"{stem}.{name}.weight"].to(dtype))
    for part in parts:
        assert isinstance(part.attention, MlaWeights)
        assert torch.equal(part.attention.kv_a_proj_with_mqa, meant[PROJECTION].to(dtype))


def test_scales_may_be_bfloat16(tmp_path: Path) -> None:
    stored, _ = quantised(CONFIG)
    scale = stored[f"{PROJECTION}_scale_inv"] = stored[f"{PROJECTION}_scale_inv"].bfloat16()
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "qwen", CONFIG, stored))
    attention = load_attention(checkpoint).layers[1].attention
    assert isinstance(attention, MlaWeights)
    expected = block_values(stored[PROJECTION], scale.float())
    assert torch.equal(attention.kv_a_proj_with_mqa, expected)


@pytest.mark.parametrize("etp", [1, 2])
def test_expert_ranks_load_the_values_that_blocks_stand_for(
    published: tuple[Path, Tensors], etp: int
) -> None:
    directory, meant = published
    checkpoint = Checkpoint.open(directory)
    parts = [load_experts(checkpoint, rank, etp=etp, shared=True)[1] for rank in range(etp)]
    for expert in range(4):
        stem = f"model.layers.1.mlp.experts.{expert}"
        gates, ups = zip(*(part.w13[expert].chunk(2) for part in parts), strict=True)
        assert torch.equal(torch.cat(gates), meant[f"{stem}.gate_proj.weight"])
        assert torch.equal(torch.cat(ups), meant[f"{stem}.up_proj.weight"])
        down = torch.cat([part.w2[expert] for part in parts], 1)
        assert torch.equal(down, meant[f"{stem}.down_proj.weight"])


def damaged(tmp_path: Path, name: str, tensor: Tensor | None) -> Path:
    stored, _ = quantised(CONFIG)
    directory = write_checkpoint(tmp_path / "fp8", CONFIG, stored)

    def edit(tensors: Tensors) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    edit_tensors(directory, edit)
    return directory


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (f"{PROJECTION}_scale_inv", None, f"there is no {PROJECTION}_scale_inv"),
        (f"{PROJECTION}_scale_inv", torch.ones(1, 2), r"must be F32 or BF16 \[2, 2\]"),
        (f"{PROJECTION}_scale_inv", torch.ones(2, 2).half(), r"is F16 \[2, 2\]; must be F32"),
        (PROJECTION, torch.ones(148, 192).to(torch.float8_e5m2), "is F8_E5M2"),
        (
            "model.layers.1.mlp.gate.weight",
            torch.ones(4, 192).to(torch.float8_e4m3fn),
            "gate.weight: is F8_E4M3",
        ),
        (PROJECTION, torch.ones(148, 192).bfloat16(), f"holds {PROJECTION}_scale_inv, which"),
    ],
)
def test_blocks_and_scales_that_do_not_belong_together_are_refused(
    tmp_path: Path, name: str, tensor: Tensor | None, words: str
) -> None:
    directory = damaged(tmp_path, name, tensor)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(directory)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"{PROJECTION}_scale_inv", torch.tensor([[1.0, float("nan")], [1.0, 1.0]])),
        (f"{PROJECTION}_scale_inv", torch.tensor([[1.0, float("inf")], [1.0, 1.0]])),
        (PROJECTION, torch.full((148, 192), float("nan")).to(torch.float8_e4m3fn)),
    ],
)
def test_scales_and_blocks_that_are_no_numbers_stop_the_load(
    tmp_path: Path, name: str, tensor: Tensor
) -> None:
    checkpoint = Checkpoint.open(damaged(tmp_path, name, tensor))
    with pytest.raises(CheckpointError, match=f"{name}: holds"):
        load_attention(checkpoint, dtype=torch.bfloat16)


def test_fp8_in_a_model_that_is_not_quantised_is_refused(tmp_path: Path) -> None:
    stored, _ = quantised(CONFIG)
    config = {key: value for key, value in CONFIG.items() if key != "quantization_config"}
    with pytest.raises(CheckpointError, match="is F8_E4M3"):
        Checkpoint.open(write_checkpoint(tmp_path / "plain", config, stored))
