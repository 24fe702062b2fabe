"""One string that says whether two processes have the same model before them.

Blake3 of the config fields that change outputs, of every safetensors header, and of the
manifest; without a manifest, of a fixed sample of every tensor. The same for every process,
whatever its rank, and cheap: no tensor is read whole. Knows no torch. A sample finds another
model in the same shapes; only a manifest finds a flipped bit.
"""

import json
from collections.abc import Iterable

from blake3 import blake3

from moe_core.checkpoint.headers import ShardHeader, TensorEntry
from moe_core.config.model import ModelConfig
from moe_core.errors import CheckpointError

_SAMPLE_BYTES = 256


def fingerprint(
    config: ModelConfig, shards: Iterable[ShardHeader], manifest_digest: str | None
) -> str:
    """64 hexadecimal digits. Raises CheckpointError where a sample cannot be read."""
    shards = sorted(shards, key=lambda shard: shard.path.name)
    described = {
        "config": config.fingerprint_fields(),
        "headers": [[shard.path.name, shard.digest] for shard in shards],
        "manifest": manifest_digest,
    }
    hasher = blake3(json.dumps(described, sort_keys=True).encode())
    if manifest_digest is None:
        for shard in shards:
            hasher.update(_samples(shard))
    return hasher.hexdigest()


def _samples(shard: ShardHeader) -> bytes:
    try:
        with shard.path.open("rb", buffering=0) as file:
            samples = []
            for entry in shard.tensors:
                offset, size = _sample(entry)
                file.seek(offset)
                samples.append(file.read(size))
                if len(samples[-1]) < size:
                    raise CheckpointError(f"{entry}: the file ends before byte {offset + size}")
            return b"".join(samples)
    except OSError as error:
        raise CheckpointError(f"{shard.path}: cannot be read: {error.strerror}") from error


def _sample(entry: TensorEntry) -> tuple[int, int]:
    """Offset and size: somewhere in the tensor, always the same for one name and size."""
    size = min(_SAMPLE_BYTES, entry.nbytes)
    drawn = int.from_bytes(blake3(entry.name.encode()).digest(length=8), "little")
    return entry.offset + drawn % (entry.nbytes - size + 1), size
