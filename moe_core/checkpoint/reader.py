"""Reads slices of tensors out of safetensors files, and nothing more than those.

Knows bytes, slices and digests; knows neither models nor types, and not torch. Files are read with
pread and not mapped: a file that shrinks meanwhile is then an error here and not a dead process,
and what is counted is what was read. (The page cache may fetch neighbouring bytes of its own
accord; those are not counted.)
"""

import math
import os
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from moe_core.checkpoint.headers import TensorEntry
from moe_core.checkpoint.manifest_format import MANIFEST_NAME, Manifest
from moe_core.errors import CheckpointError

Bytes = NDArray[np.uint8]
_MAX_OPEN_FILES = 8


class TensorReader:
    """Keeps the files that it read last open; close it, or use it as a context manager."""

    def __init__(self, manifest: Manifest | None) -> None:
        self._manifest = manifest
        self._files: dict[str, BinaryIO] = {}
        self.bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def read(self, entry: TensorEntry, axis: int, start: int, stop: int) -> Bytes:
        """Indices start … stop-1 of dimension `axis`, in row-major order.

        Returns [elements before axis, stop - start, bytes after axis]. Where a manifest is
        present, every part that the slice touches is read whole and checked. Raises
        CheckpointError naming the tensor.
        """
        if self._manifest is None or start == stop:
            return self._read(entry, axis, start, stop)
        if self._manifest.digests(entry).axis == axis:
            return self._read_checked(entry, self._manifest, axis, start, stop)
        other = self._manifest.digests(entry).axis
        whole = self._read_checked(entry, self._manifest, other, 0, entry.dims[other])
        outer, length, inner = _byte_shape(entry, axis)
        return whole.reshape(outer, length, inner)[:, start:stop]

    def _read_checked(
        self, entry: TensorEntry, manifest: Manifest, axis: int, start: int, stop: int
    ) -> Bytes:
        digests = manifest.digests(entry)
        width, parts = digests.width, digests.parts
        first, last = start // width, -(-stop // width)
        begin = first * width
        values = self._read(entry, axis, begin, min(last * width, entry.dims[axis]))
        for part in range(first, last):
            content = values[:, part * width - begin : (part + 1) * width - begin]
            if part_digest(content) != parts[part]:
                raise CheckpointError(
                    f"{entry}: part {part} of {len(parts)} along dimension {axis} does not match "
                    f"{MANIFEST_NAME}: the file is damaged, or was changed after the manifest"
                )
        wanted = values[:, start - begin : stop - begin]
        # A view would keep the neighbours in memory for as long as the slice lives.
        return wanted if wanted.shape == values.shape else wanted.copy()

    def _read(self, entry: TensorEntry, axis: int, start: int, stop: int) -> Bytes:
        outer, length, inner = _byte_shape(entry, axis)
        values = np.empty((outer, stop - start, inner), np.uint8)
        if values.size == 0:
            return values
        if outer == 1 or stop - start == length:
            self._fill(entry, entry.offset + start * inner, values.reshape(-1).data)
            return values
        for row in range(outer):
            offset = entry.offset + (row * length + start) * inner
            self._fill(entry, offset, values[row].reshape(-1).data)
        return values

    def _fill(self, entry: TensorEntry, offset: int, buffer: memoryview) -> None:
        done = 0
        try:
            descriptor = self._file(entry).fileno()
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(f"{entry}: the file ends at byte {offset + done}")
                done += count
        except OSError as error:
            raise CheckpointError(f"{entry}: cannot be read: {error.strerror}") from error
        self.bytes_read += done

    def _file(self, entry: TensorEntry) -> BinaryIO:
        path = str(entry.file)
        if path not in self._files:
            if len(self._files) == _MAX_OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            self._files[path] = entry.file.open("rb", buffering=0)
        return self._files[path]


def part_digest(content: Bytes) -> str:
    """Blake3 of the bytes in row-major order, as the manifest holds it."""
    return blake3(np.ascontiguousarray(content).data).hexdigest()


def _byte_shape(entry: TensorEntry, axis: int) -> tuple[int, int, int]:
    dims = entry.dims
    return math.prod(dims[:axis]), dims[axis], math.prod(dims[axis + 1 :]) * entry.item_bytes
