"""The header of one safetensors file: which tensor lies where, in which type and shape.

A file is 8 bytes of header length (little endian), that many bytes of JSON, then the tensors'
bytes (https://github.com/huggingface/safetensors#format). Knows that format and refuses all
else; knows neither which tensors a model has nor what their values are, and not torch.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Self, TypeGuard

from blake3 import blake3

from moe_core.checkpoint.json_files import parse_object
from moe_core.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_LENGTH_BYTES = 8
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor's place. `offset` counts from the beginning of the file, in bytes; `index` says
    that this is one row of a larger tensor's first dimension."""

    name: str
    file: Path
    dtype: str  # as safetensors names it: "BF16", "F32", "F8_E4M3", …
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    index: int | None = None

    @property
    def item_bytes(self) -> int:
        return _ITEM_BYTES[self.dtype]

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape, with one dimension of 1 for a scalar."""
        return self.shape or (1,)

    def at(self, index: int) -> Self:
        """Row `index` of the first dimension, as a tensor of its own."""
        nbytes = self.nbytes // self.shape[0]
        offset = self.offset + index * nbytes
        return replace(self, shape=self.shape[1:], offset=offset, nbytes=nbytes, index=index)

    def __str__(self) -> str:
        row = "" if self.index is None else f"[{self.index}]"
        return f"{self.file}: tensor {self.name}{row}"


@dataclass(frozen=True, slots=True)
class ShardHeader:
    path: Path
    file_bytes: int
    digest: str  # blake3 of the length field and the JSON
    tensors: tuple[TensorEntry, ...]  # in the order of their offsets


def read_header(path: Path) -> ShardHeader:
    """Raises CheckpointError naming the file, and the tensor, that break the format."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: is not there, or is not a regular file")
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length, content = _read_json(file, file_bytes, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    start = _LENGTH_BYTES + len(content)
    values = parse_object(content, f"{path}: header")
    _check_metadata(values.pop("__metadata__", None), path)
    entries = [_entry(name, value, path, start) for name, value in values.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_cover(entries, path, start, file_bytes)
    return ShardHeader(path, file_bytes, blake3(length + content).hexdigest(), tuple(entries))


def _read_json(file: BinaryIO, file_bytes: int, path: Path) -> tuple[bytes, bytes]:
    length = file.read(_LENGTH_BYTES)
    if len(length) < _LENGTH_BYTES:
        raise CheckpointError(f"{path}: {file_bytes} bytes are too few for a safetensors file")
    size = int.from_bytes(length, "little")
    if size > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: claims a header of {size} bytes, more than the {MAX_HEADER_BYTES} that "
            "safetensors allows; this is no safetensors file, or it is damaged"
        )
    if _LENGTH_BYTES + size > file_bytes:
        raise CheckpointError(
            f"{path}: claims a header of {size} bytes in a file of {file_bytes}; it is truncated"
        )
    return length, file.read(size)


def _check_metadata(metadata: object, path: Path) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: header: __metadata__ must map strings to strings")


def _entry(name: str, value: object, path: Path, start: int) -> TensorEntry:
    where = f"{path}: tensor {name}"
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: header entry must be an object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}")
    if not _is_counts(shape):
        raise CheckpointError(f"{where}: shape {shape!r} must be a list of whole numbers")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {offsets!r} must be [begin, end]")
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * _ITEM_BYTES[dtype] != nbytes:
        raise CheckpointError(f"{where}: {dtype} {shape} does not take the {nbytes} bytes it has")
    return TensorEntry(name, path, dtype, tuple(shape), start + offsets[0], nbytes)


def _is_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(entries: Iterable[TensorEntry], path: Path, start: int, file_bytes: int) -> None:
    """The tensors lie one after another, without hole or overlap, up to the end of the file."""
    end = start
    for entry in entries:
        if entry.offset != end:
            what = "overlaps the tensor before it" if entry.offset < end else "follows a hole"
            raise CheckpointError(f"{entry}: {what}: begins at byte {entry.offset}, not {end}")
        end += entry.nbytes
    if end > file_bytes:
        last = next(e for e in entries if e.offset + e.nbytes > file_bytes)
        raise CheckpointError(
            f"{last}: ends at byte {last.offset + last.nbytes} of a file of {file_bytes}; "
            "the file is truncated"
        )
    if end < file_bytes:
        raise CheckpointError(f"{path}: {file_bytes - end} bytes after the last tensor")
