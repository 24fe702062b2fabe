"""Writes a checkpoint's manifest: reads every tensor once, in the parts that ranks will read.

Knows no torch.
"""

import json
from pathlib import Path

from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.headers import TensorEntry
from moe_core.checkpoint.manifest_format import (
    MANIFEST_NAME,
    Manifest,
    TensorDigests,
    document_digests,
    part_width,
)
from moe_core.checkpoint.progress import Progress, no_progress
from moe_core.checkpoint.reader import TensorReader, part_digest
from moe_core.errors import CheckpointError


def write_manifest(directory: Path, progress: Progress = no_progress) -> Path:
    """Write the manifest beside the checkpoint, in place of one that is there.

    Progress counts tensors. Raises CheckpointError for a checkpoint that could not be served.
    """
    checkpoint = Checkpoint.open(directory, use_manifest=False)
    tensors: dict[str, TensorDigests] = {}
    with checkpoint.reader() as reader:
        for entry in checkpoint.tensors.values():
            spec = checkpoint.expected.get(entry.name)
            axis = 0 if spec is None or spec.cut_axis is None else spec.cut_axis
            tensors[entry.name] = _digests(reader, entry, axis)
            progress(len(tensors), len(checkpoint.tensors))
    headers = {shard.path.name: shard.digest for shard in checkpoint.shards}
    return _replace(directory, Manifest(document_digests(directory), headers, tensors))


def _digests(reader: TensorReader, entry: TensorEntry, axis: int) -> TensorDigests:
    width, length = part_width(entry, axis), entry.dims[axis]
    starts = range(0, length, width)
    contents = (reader.read(entry, axis, at, min(at + width, length)) for at in starts)
    return TensorDigests(axis, width, tuple(map(part_digest, contents)))


def _replace(directory: Path, manifest: Manifest) -> Path:
    """Written under another name first: a reader sees the old manifest or the new one, whole."""
    path = directory / MANIFEST_NAME
    unfinished = path.with_suffix(".json.partial")
    try:
        unfinished.write_text(json.dumps(manifest.as_json(), indent=0, sort_keys=True))
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    return path
