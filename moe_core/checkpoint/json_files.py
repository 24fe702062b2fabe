"""Small JSON files of a checkpoint, read strictly.

Knows JSON and size limits; knows nothing of what the files mean.
"""

import json
from pathlib import Path

from moe_core.errors import CheckpointError


def read_bytes(path: Path, limit: int) -> bytes:
    """A whole file of at most `limit` bytes. Raises CheckpointError, naming the file."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: is not there, or is not a regular file")
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"{path}: {size} bytes, more than the {limit} that are allowed")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def parse_object(content: bytes, where: str) -> dict[str, object]:
    """A JSON object in which no key occurs twice. Raises CheckpointError, naming `where`."""
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: must hold a JSON object, not {type(values).__name__}")
    return values


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    keys = [key for key, _ in pairs]
    "".join(keys).encode()  # raises ValueError for half of a surrogate pair, which is no text
    if len(values) < len(pairs):
        twice = next(key for position, key in enumerate(keys) if key in keys[:position])
        raise ValueError(f"the key {twice!r} occurs twice")
    return values
