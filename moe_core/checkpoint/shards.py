"""The safetensors files of a checkpoint directory, and the one table of their tensors.

Knows the index file and its rules; knows neither model nor values, and not torch.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from moe_core.checkpoint.headers import ShardHeader, TensorEntry, read_header
from moe_core.checkpoint.json_files import parse_object, read_bytes
from moe_core.errors import CheckpointError, ConfigError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_INDEX_BYTES = 256 << 20


def read_shards(directory: Path) -> tuple[ShardHeader, ...]:
    """The headers of the files that the index names, or of the one file where there is no index.

    Raises ConfigError where there is neither, CheckpointError for a missing, damaged or unlisted
    file, a tensor that lies in two files or not where the index says, and an index that points
    outside of the directory.
    """
    index, single = directory / INDEX_NAME, directory / SINGLE_NAME
    if not index.exists():
        if not single.exists():
            raise ConfigError("model", str(directory), f"must hold {SINGLE_NAME} or {INDEX_NAME}")
        return (read_header(single),)
    weight_map = _read_weight_map(index)
    files = sorted(set(weight_map.values()))
    if single.exists() and SINGLE_NAME not in files:
        raise CheckpointError(
            f"{directory}: holds {SINGLE_NAME} and an index that does not name it; which one is "
            "the model cannot be told: remove one"
        )
    shards = tuple(read_header(directory / file) for file in files)
    _check_index(index, weight_map, tensor_table(shards))
    return shards


def tensor_table(shards: Iterable[ShardHeader]) -> dict[str, TensorEntry]:
    """All tensors by name. Raises CheckpointError for a name that occurs in two files."""
    table: dict[str, TensorEntry] = {}
    for shard in shards:
        for entry in shard.tensors:
            if entry.name in table:
                other = table[entry.name].file.name
                raise CheckpointError(f"{entry}: lies in {other} as well; one of them is stale")
            table[entry.name] = entry
    return table


def _read_weight_map(index: Path) -> dict[str, str]:
    values = parse_object(read_bytes(index, _MAX_INDEX_BYTES), str(index))
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object with entries")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_file_name(file):
            raise CheckpointError(
                f"{index}: tensor {name}: {file!r} must be the plain name of a .safetensors file "
                "in the same directory"
            )
    return weight_map


def _is_plain_file_name(file: str) -> bool:
    return file.endswith(".safetensors") and not {"/", "\\", "\0"} & set(file)


def _check_index(
    index: Path, weight_map: Mapping[str, str], table: Mapping[str, TensorEntry]
) -> None:
    for name, file in weight_map.items():
        if name not in table:
            raise CheckpointError(f"{index}: tensor {name}: is not in {file}")
        if table[name].file.name != file:
            actual = table[name].file.name
            raise CheckpointError(f"{index}: tensor {name}: lies in {actual}, not in {file}")
    for name, entry in table.items():
        if name not in weight_map:
            raise CheckpointError(f"{entry}: is not in {index.name}")
