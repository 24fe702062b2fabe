"""Model directories that cannot be served, or not in this cluster, made from the bundled model.

Knows files only.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moe_core.checkpoint.manifest import write_manifest

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# Of an attention process, and of one expert.
NORM = "model.layers.1.input_layernorm.weight"
EXPERT = "model.layers.2.mlp.experts.5.down_proj.weight"

Tensors = dict[str, torch.Tensor]


def make_wrong_models(model: Path, below: Path) -> dict[str, str]:
    """Their paths by what is wrong with them."""

    def copy(name: str, *files: str) -> Path:
        (below / name).mkdir()
        for file in files:
            shutil.copy(model / file, below / name)
        return below / name

    copy("empty")
    copy("without_weights", CONFIG)
    _change_config(copy("unknown_family", CONFIG, WEIGHTS), model_type="llama")
    _cut(copy("cut_short", CONFIG, WEIGHTS))
    _edit(copy("retrained", CONFIG, WEIGHTS), lambda t: t["model.norm.weight"].mul_(2))
    _edit(copy("lacks_a_tensor", CONFIG, WEIGHTS), lambda t: t.pop(EXPERT))
    _edit(copy("one_too_many", CONFIG, WEIGHTS), lambda t: t.update(more=torch.zeros(1)))
    _edit(copy("another_shape", CONFIG, WEIGHTS), lambda t: t.update({NORM: t[NORM][:-1].clone()}))
    _edit(copy("not_finite", CONFIG, WEIGHTS), lambda t: t[EXPERT][3, 4:5].fill_(torch.nan))
    _flip_a_bit(copy("bit_flipped", CONFIG, WEIGHTS))
    return {path.name: str(path) for path in below.iterdir()} | {"missing": str(below / "missing")}


def _change_config(directory: Path, **changes: object) -> None:
    values = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(values | changes))


def _cut(directory: Path) -> None:
    with (directory / WEIGHTS).open("r+b") as file:
        file.truncate(100_000)


def _edit(directory: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS)


def _flip_a_bit(directory: Path) -> None:
    """Of EXPERT, after a manifest was written."""
    write_manifest(directory)
    content = bytearray((directory / WEIGHTS).read_bytes())
    data = 8 + int.from_bytes(content[:8], "little")
    content[data + json.loads(content[8:data])[EXPERT]["data_offsets"][0]] ^= 1
    (directory / WEIGHTS).write_bytes(content)
