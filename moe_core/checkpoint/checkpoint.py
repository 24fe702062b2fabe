"""An opened checkpoint: its config, the table of its tensors, its manifest and fingerprint.

Everything here comes from headers and small files; tensors are read by the loaders, through
`reader()`. Knows no torch, so that the gateway can open what the workers load.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from moe_core.checkpoint.expected import TensorSpec, expected_tensors
from moe_core.checkpoint.fingerprint import fingerprint
from moe_core.checkpoint.headers import ShardHeader, TensorEntry
from moe_core.checkpoint.manifest_format import Manifest, load_manifest
from moe_core.checkpoint.reader import TensorReader
from moe_core.checkpoint.shards import read_shards, tensor_table
from moe_core.checkpoint.validation import check_tensors
from moe_core.config.model import ModelConfig
from moe_core.errors import ConfigError


class Checkpoint:
    """`bytes_read` counts the tensors' bytes that loaders have read; not headers or samples."""

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        shards: tuple[ShardHeader, ...],
        manifest: Manifest | None,
        manifest_digest: str | None,
    ) -> None:
        self.directory = directory
        self.config = config
        self.shards = shards
        self.tensors: Mapping[str, TensorEntry] = tensor_table(shards)
        self.expected: Mapping[str, TensorSpec] = expected_tensors(config, self.tensors)
        self.manifest = manifest
        self._manifest_digest = manifest_digest
        self._fingerprint: str | None = None
        self.bytes_read = 0
        check_tensors(config, self.expected, self.tensors)

    @classmethod
    def open(cls, directory: Path, *, use_manifest: bool = True) -> Self:
        """Read config.json, headers and manifest, and check that they agree.

        `use_manifest=False` is for whoever is about to write a new one. Raises ConfigError for a
        directory that is no checkpoint and a config.json that cannot be served, CheckpointError
        for all else.
        """
        if not directory.is_dir():
            raise ConfigError("model", str(directory), "must be an existing directory")
        if not (directory / "config.json").is_file():
            raise ConfigError("model", str(directory), "must hold a config.json")
        found = load_manifest(directory) if use_manifest else None
        manifest, digest = found if found is not None else (None, None)
        shards = read_shards(directory)
        if manifest is not None:
            manifest.check(directory, shards)
        return cls(directory, ModelConfig.from_hf(directory), shards, manifest, digest)

    def fingerprint(self) -> str:
        """See fingerprint.py; computed once."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.config, self.shards, self._manifest_digest)
        return self._fingerprint

    @contextmanager
    def reader(self) -> Iterator[TensorReader]:
        """Reads tensors, checking them where there is a manifest; adds to `bytes_read`."""
        reader = TensorReader(self.manifest)
        try:
            yield reader
        finally:
            reader.close()
            self.bytes_read += reader.bytes_read
