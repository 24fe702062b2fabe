"""Model directories that cannot be served, or not in this cluster, made from the bundled model.

Knows files only.
"""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "model.safetensors", "config.json"


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
    _change_one_weight(copy("retrained", CONFIG, WEIGHTS))
    return {path.name: str(path) for path in below.iterdir()} | {"missing": str(below / "missing")}


def _change_config(directory: Path, **changes: object) -> None:
    values = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(values | changes))


def _cut(directory: Path) -> None:
    with (directory / WEIGHTS).open("r+b") as file:
        file.truncate(100_000)


def _change_one_weight(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, directory / WEIGHTS)
