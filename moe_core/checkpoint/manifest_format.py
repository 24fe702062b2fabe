"""epserve.manifest.json: digests of everything that a checkpoint's outputs depend on.

Knows the format and compares; knows neither how tensors are read nor what they mean, and not
torch. A tensor's digests are of *parts* along the dimension that tensor parallelism cuts, so
that a rank checks what it reads, reading no more than the parts that its slice touches: one
part for each expert of a fused tensor, else up to 8 of at least 64 KiB. The digest of a part is
blake3 of its bytes in row-major order.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from moe_core.checkpoint.headers import ShardHeader, TensorEntry
from moe_core.checkpoint.json_files import parse_object, read_bytes
from moe_core.checkpoint.shards import INDEX_NAME
from moe_core.errors import CheckpointError

MANIFEST_NAME = "epserve.manifest.json"
MANIFEST_FORMAT = "epserve-manifest-1"
# What a process reads beside the tensors' files.
_DOCUMENTS = ("config.json", "generation_config.json", INDEX_NAME)
_MAX_DOCUMENT_BYTES = 256 << 20
_MAX_MANIFEST_BYTES = 1 << 30
_MAX_PARTS = 8
_MIN_PART_BYTES = 64 << 10
_REMEDY = "if the file was meant to change, run `epserve manifest` on the directory again"


@dataclass(frozen=True, slots=True)
class TensorDigests:
    """Part i is indices i·width … (i+1)·width - 1 of dimension `axis`; the last may be shorter."""

    axis: int
    width: int
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    documents: Mapping[str, str]  # file name -> digest
    headers: Mapping[str, str]  # file name -> digest of its safetensors header
    tensors: Mapping[str, TensorDigests]

    def digests(self, entry: TensorEntry) -> TensorDigests:
        """Of a tensor that `check` has seen; of one row, where `entry` is one."""
        whole = self.tensors[entry.name]
        if entry.index is None:
            return whole
        return TensorDigests(0, entry.shape[0], (whole.parts[entry.index],))

    def as_json(self) -> dict[str, object]:
        tensors = {
            name: {"axis": d.axis, "width": d.width, "parts": list(d.parts)}
            for name, d in self.tensors.items()
        }
        return {
            "format": MANIFEST_FORMAT,
            "documents": dict(self.documents),
            "headers": dict(self.headers),
            "tensors": tensors,
        }

    def check(self, directory: Path, shards: Iterable[ShardHeader]) -> None:
        """Compare all that can be compared without reading tensors. Raises CheckpointError."""
        _compare(directory, self.documents, document_digests(directory))
        _compare(directory, self.headers, {shard.path.name: shard.digest for shard in shards})
        for shard in shards:
            for entry in shard.tensors:
                if not _fits(self.tensors.get(entry.name), entry):
                    raise CheckpointError(f"{entry}: has no usable digests in {MANIFEST_NAME}")


def load_manifest(directory: Path) -> tuple[Manifest, str] | None:
    """The manifest and its own digest, or None where the directory has none."""
    path = directory / MANIFEST_NAME
    if not path.exists():
        return None
    content = read_bytes(path, _MAX_MANIFEST_BYTES)
    values = parse_object(content, str(path))
    if values.get("format") != MANIFEST_FORMAT:
        raise CheckpointError(
            f"{path}: format is {values.get('format')!r}, must be {MANIFEST_FORMAT!r}; run "
            "`epserve manifest` again"
        )
    tensors = values.get("tensors")
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: tensors must be an object")
    manifest = Manifest(
        documents=_strings(values.get("documents"), path, "documents"),
        headers=_strings(values.get("headers"), path, "headers"),
        tensors={name: _tensor_digests(value, path, name) for name, value in tensors.items()},
    )
    return manifest, blake3(content).hexdigest()


def document_digests(directory: Path) -> dict[str, str]:
    """Of the documents that are there."""
    present = (name for name in _DOCUMENTS if (directory / name).exists())
    return {n: blake3(read_bytes(directory / n, _MAX_DOCUMENT_BYTES)).hexdigest() for n in present}


def part_width(entry: TensorEntry, axis: int) -> int:
    """How many indices of dimension `axis` one digest covers."""
    if len(entry.shape) > 2:
        return 1
    length = entry.dims[axis]
    parts = max(1, min(_MAX_PARTS, length, entry.nbytes // _MIN_PART_BYTES))
    return max(1, -(-length // parts))


def _fits(digests: TensorDigests | None, entry: TensorEntry) -> bool:
    if digests is None or not 0 <= digests.axis < len(entry.dims) or digests.width < 1:
        return False
    if len(entry.shape) > 2 and (digests.axis, digests.width) != (0, 1):
        return False
    return len(digests.parts) == -(-entry.dims[digests.axis] // digests.width)


def _compare(directory: Path, recorded: Mapping[str, str], actual: Mapping[str, str]) -> None:
    for name in sorted({*recorded, *actual}):
        if name not in recorded:
            raise CheckpointError(f"{directory / name}: is not in {MANIFEST_NAME}; {_REMEDY}")
        if name not in actual:
            raise CheckpointError(
                f"{directory / name}: is in {MANIFEST_NAME}, but not part of the checkpoint"
            )
        if recorded[name] != actual[name]:
            what = "header" if name.endswith(".safetensors") else "content"
            raise CheckpointError(
                f"{directory / name}: its {what} does not match {MANIFEST_NAME}; {_REMEDY}"
            )


def _strings(value: object, path: Path, what: str) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return value
    raise CheckpointError(f"{path}: {what} must map names to digests")


def _tensor_digests(value: object, path: Path, name: str) -> TensorDigests:
    fields = value if isinstance(value, dict) else {}
    axis, width, parts = fields.get("axis"), fields.get("width"), fields.get("parts")
    if isinstance(axis, int) and isinstance(width, int) and isinstance(parts, list):
        return TensorDigests(axis, width, tuple(map(str, parts)))
    raise CheckpointError(f"{path}: tensor {name}: must have an axis, a width and a list of parts")
