"""The fingerprint: equal for the same model, different for another, cheap, and without torch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.manifest import write_manifest
from support.checkpoint_files import (
    deepseek_config,
    edit_tensors,
    load_attention,
    random_tensors,
    write_checkpoint,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    config = deepseek_config()
    return write_checkpoint(tmp_path / "model", config, random_tensors(config))


def fingerprint(directory: Path) -> str:
    return Checkpoint.open(directory).fingerprint()


def test_the_same_files_elsewhere_have_the_same_fingerprint(directory: Path) -> None:
    before = fingerprint(directory)
    assert len(before) == 64
    assert fingerprint(directory.rename(directory.parent / "elsewhere")) == before


def test_loading_a_part_does_not_change_it(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    load_attention(checkpoint, 1, 2, shared=False, dtype=torch.float64)
    assert checkpoint.fingerprint() == fingerprint(directory)


def test_it_reads_samples_and_no_tensor(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    checkpoint.fingerprint()
    assert checkpoint.bytes_read == 0


@pytest.mark.parametrize("name", sorted(random_tensors(deepseek_config()))[::7])
def test_another_value_throughout_any_tensor_changes_it(directory: Path, name: str) -> None:
    before = fingerprint(directory)
    edit_tensors(directory, lambda tensors: tensors[name].add_(1))
    assert fingerprint(directory) != before


@pytest.mark.parametrize(
    ("old", "new"), [("2.5", "2.25"), ('"rope_theta": 10000.0', '"rope_theta": 10001.0')]
)
def test_a_config_value_that_changes_outputs_changes_it(
    directory: Path, old: str, new: str
) -> None:
    before = fingerprint(directory)
    config = directory / "config.json"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    assert fingerprint(directory) != before


def test_a_config_key_that_changes_nothing_does_not_change_it(directory: Path) -> None:
    before = fingerprint(directory)
    config = directory / "config.json"
    config.write_text(config.read_text().replace("{", '{"transformers_version": "9", ', 1))
    assert fingerprint(directory) == before


def test_with_a_manifest_every_bit_counts(directory: Path) -> None:
    without = fingerprint(directory)
    write_manifest(directory)
    before = fingerprint(directory)
    assert before != without
    edit_tensors(directory, lambda tensors: tensors["lm_head.weight"][3, 3].add_(1e-4))
    write_manifest(directory)
    assert fingerprint(directory) != before


def test_computing_it_and_writing_a_manifest_import_no_torch(directory: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from moe_core.checkpoint.checkpoint import Checkpoint\n"
        "from moe_core.checkpoint.manifest import write_manifest\n"
        "directory = Path(sys.argv[1])\n"
        "print(Checkpoint.open(directory).fingerprint())\n"
        "write_manifest(directory)\n"
        "assert 'torch' not in sys.modules\n"
    )
    expected = fingerprint(directory)
    done = subprocess.run(
        [sys.executable, "-c", script, str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected
