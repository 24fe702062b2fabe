"""The manifest: what it covers, what finding fault with it looks like, and what checking costs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.manifest import write_manifest
from moe_core.config.model import ModelConfig
from moe_core.errors import CheckpointError
from support.checkpoint_files import (
    Json,
    deepseek_config,
    edit_tensors,
    fused,
    load_attention,
    load_experts,
    random_tensors,
    write_checkpoint,
)

MANIFEST = "epserve.manifest.json"
NORM = "model.layers.1.input_layernorm.weight"
# An expert's tensors are of 256 KiB: four parts each.
CONFIG: Json = deepseek_config(hidden_size=256, moe_intermediate_size=256)


def load_everything(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    load_attention(checkpoint)
    load_experts(checkpoint)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("manifest") / "stored"
    return write_checkpoint(directory, CONFIG, random_tensors(CONFIG))


@pytest.fixture(scope="module")
def covered(stored: Path) -> Path:
    assert write_manifest(stored) == stored / MANIFEST
    return stored


@pytest.fixture
def small(tmp_path: Path) -> Path:
    config = deepseek_config()
    directory = write_checkpoint(tmp_path / "small", config, random_tensors(config))
    write_manifest(directory)
    return directory


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_everything(directory)
    return str(caught.value)


def flip(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((directory / MANIFEST).read_text())
    edit(values)
    (directory / MANIFEST).write_text(json.dumps(values))


def test_an_untouched_checkpoint_loads(covered: Path) -> None:
    load_everything(covered)


def test_it_is_written_again_to_the_same_content_and_leaves_nothing_beside(small: Path) -> None:
    first = (small / MANIFEST).read_bytes()
    write_manifest(small)
    assert (small / MANIFEST).read_bytes() == first
    assert {p.name for p in small.iterdir()} == {"config.json", "model.safetensors", MANIFEST}


def test_writing_tells_how_far_it_is(small: Path) -> None:
    steps: list[tuple[int, int]] = []
    write_manifest(small, lambda done, total: steps.append((done, total)))
    count = len(load_file(small / "model.safetensors"))
    assert steps == [(n, count) for n in range(1, count + 1)]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_stops_the_start_with_the_tensors_name(
    small: Path, where: float, bit: int
) -> None:
    path = small / "model.safetensors"
    entries = Checkpoint.open(small).tensors.values()
    begin = min(entry.offset for entry in entries)
    place = begin + int(where * (path.stat().st_size - begin))
    hit = next(e for e in entries if e.offset <= place < e.offset + e.nbytes)
    flip(path, place, bit)
    message = refusal(small)
    flip(path, place, bit)
    assert f"{path}: tensor {hit.name}: part" in message
    assert f"does not match {MANIFEST}" in message


def test_a_flipped_bit_in_an_expert_stops_only_the_processes_that_hold_it(covered: Path) -> None:
    entry = Checkpoint.open(covered).tensors["model.layers.2.mlp.experts.5.down_proj.weight"]
    flip(entry.file, entry.offset + entry.nbytes - 1, 0)
    try:
        load_experts(Checkpoint.open(covered), 1, ep=4, etp=1)
        with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts\.5\.down_proj"):
            load_experts(Checkpoint.open(covered), 2, ep=4, etp=1)
        load_experts(Checkpoint.open(covered), 4, ep=4, etp=2)  # holds its left half
        with pytest.raises(CheckpointError, match=r"experts\.5\.down_proj"):
            load_experts(Checkpoint.open(covered), 5, ep=4, etp=2)
    finally:
        flip(entry.file, entry.offset + entry.nbytes - 1, 0)


def test_swapped_names_are_found(small: Path) -> None:
    path = small / "model.safetensors"
    tensors = load_file(path)
    other = "model.layers.2.input_layernorm.weight"
    tensors[NORM], tensors[other] = tensors[other], tensors[NORM]
    save_file(tensors, path)
    assert "does not match" in refusal(small)


def test_a_header_that_names_tensors_differently_is_found(small: Path) -> None:
    path = small / "model.safetensors"
    content = path.read_bytes()
    first, second = b"layers.1.input_layernorm", b"layers.2.input_layernorm"
    swapped = content.replace(first, b"#" * len(first)).replace(second, first)
    path.write_bytes(swapped.replace(b"#" * len(first), second))
    assert f"{path}: its header does not match {MANIFEST}" in refusal(small)


def test_a_changed_config_is_found(small: Path) -> None:
    path = small / "config.json"
    path.write_text(path.read_text().replace("2.5", "2.6"))
    assert f"{path}: its content does not match {MANIFEST}" in refusal(small)


def test_a_generation_config_that_came_later_is_found(small: Path) -> None:
    (small / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert "generation_config.json: is not in" in refusal(small)


def test_a_file_that_is_gone_is_found(small: Path) -> None:
    edit_manifest(small, lambda values: values["headers"].update({"b.safetensors": "0"}))
    assert f"b.safetensors: is in {MANIFEST}, but not part of the checkpoint" in refusal(small)


def test_a_stale_manifest_can_be_replaced(small: Path) -> None:
    edit_tensors(small, lambda tensors: tensors[NORM].add_(1))
    assert "does not match" in refusal(small)
    write_manifest(small)
    load_everything(small)


def test_a_checkpoint_that_cannot_be_served_gets_no_manifest(small: Path) -> None:
    edit_tensors(small, lambda tensors: tensors.pop(NORM))
    (small / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {NORM}"):
        write_manifest(small)
    assert not (small / MANIFEST).exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"format": "other"}', "format is 'other'"),
        ('{"format": "epserve-manifest-1"}', "tensors must be an object"),
        ('{"format": "epserve-manifest-1", "tensors": {}}', "documents must map"),
        ('{"format": "epserve-manifest-1", "tensors": {"a": 1}, "documents": {}}', "headers"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(small: Path, content: str, words: str) -> None:
    (small / MANIFEST).write_text(content)
    assert words in refusal(small)


@pytest.mark.parametrize(
    "digests",
    [
        None,
        {"axis": 0, "width": 1},
        {"axis": 1, "width": 32, "parts": ["0"]},
        {"axis": -1, "width": 32, "parts": ["0"]},
        {"axis": 0, "width": 0, "parts": ["0"]},
        {"axis": 0, "width": 16, "parts": ["0"]},
    ],
)
def test_digests_that_do_not_cover_a_tensor_are_refused(small: Path, digests: object) -> None:
    edit_manifest(small, lambda values: values["tensors"].update({NORM: digests}))
    assert f"tensor {NORM}" in refusal(small)


def stored_routed_bytes(directory: Path) -> int:
    tensors = Checkpoint.open(directory).tensors.items()
    return sum(entry.nbytes for name, entry in tensors if ".experts." in name)


@pytest.mark.parametrize("etp", [1, 2, 4])
def test_checking_reads_no_more_where_slices_are_whole_parts(covered: Path, etp: int) -> None:
    for rank in range(4 * etp):
        checkpoint = Checkpoint.open(covered)
        load_experts(checkpoint, rank, ep=4, etp=etp)
        assert checkpoint.bytes_read * 4 * etp == stored_routed_bytes(covered)


def test_checking_reads_the_parts_that_a_finer_slice_touches(covered: Path) -> None:
    checkpoint = Checkpoint.open(covered)
    load_experts(checkpoint, ep=1, etp=8)  # half of one of four parts
    assert checkpoint.bytes_read * 4 == stored_routed_bytes(covered)


def test_fused_experts_are_checked_one_by_one(tmp_path: Path) -> None:
    tensors = fused(random_tensors(CONFIG), ModelConfig.from_hf(CONFIG))
    directory = write_checkpoint(tmp_path / "fused", CONFIG, tensors)
    write_manifest(directory)
    checkpoint = Checkpoint.open(directory)
    load_experts(checkpoint, 1, ep=4)
    assert checkpoint.bytes_read * 4 == stored_routed_bytes(directory)
    entry = checkpoint.tensors["model.layers.1.mlp.experts.gate_up_proj"].at(3)
    flip(entry.file, entry.offset, 7)
    load_experts(Checkpoint.open(directory), 2, ep=4, etp=1)
    with pytest.raises(CheckpointError, match=r"gate_up_proj\[3\]: part 0 of 1"):
        load_experts(Checkpoint.open(directory), 1, ep=4, etp=1)


@pytest.mark.parametrize("tp", [2, 4])
def test_checked_slices_hold_the_same_values(covered: Path, tmp_path: Path, tp: int) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("config.json", "model.safetensors"):
        (plain / name).symlink_to(covered / name)
    for rank in range(tp):
        unchecked, checked = (
            load_attention(Checkpoint.open(directory), rank, tp) for directory in (plain, covered)
        )
        assert torch.equal(unchecked.embed_tokens, checked.embed_tokens)
        assert checked.embed_tokens.untyped_storage().nbytes() == checked.embed_tokens.nbytes
        shared, shared_checked = unchecked.layers[1].shared_expert, checked.layers[1].shared_expert
        assert shared is not None
        assert shared_checked is not None
        assert torch.equal(shared.down_proj, shared_checked.down_proj)
        assert torch.equal(shared.up_proj, shared_checked.up_proj)
