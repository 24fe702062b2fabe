"""Whether a directory's files together are the model that config.json describes."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.errors import CheckpointError
from support.checkpoint_files import (
    Tensors,
    deepseek_config,
    edit_tensors,
    edit_weight_map,
    load_attention,
    random_tensors,
    write_checkpoint,
)

NORM = "model.layers.1.input_layernorm.weight"
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    config = deepseek_config()
    return write_checkpoint(tmp_path / "single", config, random_tensors(config))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    config = deepseek_config()
    return write_checkpoint(tmp_path / "sharded", config, random_tensors(config), num_files=3)


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    return str(caught.value)


def put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


def test_single_and_sharded_checkpoints_hold_the_same_tensors(single: Path, sharded: Path) -> None:
    one, many = Checkpoint.open(single).tensors, Checkpoint.open(sharded).tensors
    assert {n: e.shape for n, e in one.items()} == {n: e.shape for n, e in many.items()}
    assert len({entry.file for entry in many.values()}) == 3


@pytest.mark.parametrize("name", [NORM, EXPERT, "lm_head.weight"])
def test_a_missing_tensor_is_named(single: Path, name: str) -> None:
    edit_tensors(single, lambda tensors: tensors.pop(name))
    assert f"lacks {name}" in refusal(single)


def test_many_missing_tensors_are_counted(single: Path) -> None:
    def without_layer(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith("model.layers.2.mlp.experts.")]:
            del tensors[name]

    edit_tensors(single, without_layer)
    assert "and 21 more" in refusal(single)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.experts.8.up_proj.weight",
        "model.layers.3.input_layernorm.weight",
        "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv",
        "lm_head.weight_scale_inv",
    ],
)
def test_an_extra_tensor_is_named(single: Path, name: str) -> None:
    edit_tensors(single, put(name, torch.zeros(4)))
    assert f"holds {name}, which deepseek_v3 does not have" in refusal(single)


def test_a_layer_too_many_is_explained(single: Path) -> None:
    edit_tensors(single, put("model.layers.3.input_layernorm.weight", torch.zeros(32)))
    assert "config.json has 3 layers and num_nextn_predict_layers=0" in refusal(single)


def test_announced_prediction_layers_are_ignored_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = deepseek_config(num_nextn_predict_layers=1)
    tensors = random_tensors(config)
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(2, 2)
    with caplog.at_level(logging.INFO):
        Checkpoint.open(write_checkpoint(tmp_path / "mtp", config, tensors))
    assert "ignoring 1 tensors" in caplog.text


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
)
def test_stored_rotary_frequencies_are_harmless(single: Path, name: str) -> None:
    edit_tensors(single, put(name, torch.zeros(2)))
    Checkpoint.open(single)


def test_a_tensor_without_elements_is_harmless(single: Path) -> None:
    edit_tensors(single, put("model.layers.1.mlp.nothing.weight", torch.zeros(0, 32)))
    Checkpoint.open(single)


@pytest.mark.parametrize("shape", [(33,), (32, 1), ()])
def test_a_wrong_shape_is_named_with_both_shapes(single: Path, shape: tuple[int, ...]) -> None:
    edit_tensors(single, put(NORM, torch.zeros(shape)))
    message = refusal(single)
    assert f"tensor {NORM}: has shape {list(shape)}; config.json asks for [32]" in message


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.float8_e4m3fn, torch.bool])
def test_a_type_that_the_model_does_not_have_is_named(single: Path, dtype: torch.dtype) -> None:
    edit_tensors(single, lambda tensors: put(EXPERT, tensors[EXPERT].to(dtype))(tensors))
    message = refusal(single)
    assert f"tensor {EXPERT}: is " in message
    assert "dtype float32" in message


@pytest.mark.parametrize(
    ("model", "tensor"), [("bfloat16", torch.float16), ("float16", torch.bfloat16)]
)
def test_the_other_16_bit_type_is_refused(tmp_path: Path, model: str, tensor: torch.dtype) -> None:
    config = deepseek_config(torch_dtype=model)
    assert "is " in refusal(
        write_checkpoint(tmp_path / "x", config, random_tensors(config, tensor))
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [NORM, "model.layers.1.mlp.gate.e_score_correction_bias"])
def test_a_value_that_is_no_number_stops_the_load(single: Path, name: str, value: float) -> None:
    edit_tensors(single, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))
    checkpoint = Checkpoint.open(single)
    with pytest.raises(CheckpointError, match=rf"{name}: holds (NaN|infinity)"):
        load_attention(checkpoint)


def test_a_value_beyond_the_chosen_type_stops_the_load(single: Path) -> None:
    edit_tensors(single, lambda tensors: tensors[NORM].fill_(1e30))
    checkpoint = Checkpoint.open(single)
    with pytest.raises(CheckpointError, match="holds infinity as float16"):
        load_attention(checkpoint, dtype=torch.float16)


def test_a_file_cut_after_it_was_opened_stops_the_load(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="the file ends at byte"):
        load_attention(checkpoint)


def test_weights_beside_an_index_that_does_not_name_them_are_refused(sharded: Path) -> None:
    save_file({"a": torch.zeros(1)}, sharded / "model.safetensors")
    assert "remove one" in refusal(sharded)


def test_files_that_the_index_does_not_name_are_left_alone(sharded: Path) -> None:
    (sharded / "consolidated.safetensors").write_bytes(b"something else")
    Checkpoint.open(sharded)


def test_a_missing_file_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors: is not there" in refusal(sharded)


def test_a_tensor_that_is_not_where_the_index_says_is_named(sharded: Path) -> None:
    def move(weight_map: dict[str, str]) -> None:
        weight_map[NORM] = min(set(weight_map.values()) - {weight_map[NORM]})

    edit_weight_map(sharded, move)
    assert f"tensor {NORM}: lies in " in refusal(sharded)


def test_a_tensor_that_only_the_index_knows_is_named(sharded: Path) -> None:
    edit_weight_map(sharded, lambda m: m.update({"ghost": m[NORM]}))
    assert "tensor ghost: is not in" in refusal(sharded)


def test_a_tensor_that_the_index_forgot_is_named(sharded: Path) -> None:
    edit_weight_map(sharded, lambda m: m.pop(NORM))
    assert f"tensor {NORM}: is not in model.safetensors.index.json" in refusal(sharded)


def test_a_tensor_in_two_files_is_named(sharded: Path) -> None:
    for file in sorted(sharded.glob("*.safetensors"))[:2]:
        save_file(load_file(file) | {"twice": torch.zeros(1)}, file)
    edit_weight_map(sharded, lambda m: m.update({"twice": m[NORM]}))
    assert "tensor twice: lies in model-00001-of-00003.safetensors as well" in refusal(sharded)


@pytest.mark.parametrize(
    "file",
    [
        "../single/model.safetensors",
        "/etc/passwd.safetensors",
        "..",
        "a\\b.safetensors",
        "x.bin",
        3,
    ],
)
def test_an_index_that_points_elsewhere_is_refused(sharded: Path, file: object) -> None:
    edit_weight_map(sharded, lambda m: m.update({NORM: file}))
    assert f"tensor {NORM}: {file!r} must be the plain name" in refusal(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {}])
def test_an_index_without_a_weight_map_is_refused(sharded: Path, weight_map: object) -> None:
    path = sharded / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    assert "weight_map" in refusal(sharded)
