"""KV blocks as the bytes in which they travel to another process, and back.

Knows the cache's tensors. Knows no sequence, no stream and no peer.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moe_core.errors import ProtocolError
from moe_core.model.kv_cache import KvCache
from moe_core.transport.handover import HandoverSpec, UnitKind, digest_of
from moe_core.transport.wire import dtype_name

UNIT_BYTES = 256 << 10  # enough to be worth a round trip, and little beyond the blocks of a few


class KvBlockBytes:
    """Part by part of every layer, the blocks' values in the order in which they are asked for."""

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache
        self._parts = cache.parts
        self.block_bytes = sum(part[0].nbytes for part in self._parts)

    @property
    def blocks_per_unit(self) -> int:
        return max(1, UNIT_BYTES // self.block_bytes)

    def spec(self, model_fingerprint: str, tp_rank: int, tp_size: int) -> HandoverSpec:
        shapes = dict.fromkeys(tuple(part.shape[2:]) for part in self._parts)
        return HandoverSpec(
            model_fingerprint=model_fingerprint,
            dtype=dtype_name(self._parts[0].dtype),
            shard_rank=tp_rank,
            shard_size=tp_size,
            unit_bytes=self.blocks_per_unit * self.block_bytes,
            kind=UnitKind.KV_BLOCKS,
            layout=f"{len(self._parts)} tensors of {[*shapes]} per token, "
            f"block_size={self._cache.block_size}",
        )

    def store(self, blocks: Sequence[int], memory: Tensor) -> bytes:
        """Fill `memory` [unit_bytes] uint8 and return the digest of what it then holds. Raises
        ProtocolError for more blocks than a unit has, or one that does not exist."""
        self._check(blocks)
        ids = self._ids(blocks)
        end = 0
        for part, view in self._views(blocks, memory):
            view.copy_(part[ids])
            end += view.nbytes
        memory[end:] = 0
        return digest_of(memory)

    def restore(self, memory: Tensor, digest: bytes, blocks: Sequence[int]) -> None:
        """Write what `memory` holds to `blocks` of this cache. Raises ProtocolError where that is
        not what `digest` was made from, and as `store`."""
        self._check(blocks)
        found = digest_of(memory)
        if found != digest:
            raise ProtocolError(
                f"{len(blocks)} KV blocks came damaged: the blake3 of {memory.nbytes} bytes is "
                f"{found.hex()}, the sender's {digest.hex()}"
            )
        ids = self._ids(blocks)
        for part, view in self._views(blocks, memory):
            part[ids] = view.to(part.device)

    def _check(self, blocks: Sequence[int]) -> None:
        if not 0 < len(blocks) <= self.blocks_per_unit:
            raise ProtocolError(f"{len(blocks)} KV blocks: a unit has 1 to {self.blocks_per_unit}")
        if max(blocks) >= self._cache.num_blocks:
            raise ProtocolError(f"KV block {max(blocks)}: there are {self._cache.num_blocks}")

    def _ids(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self._parts[0].device)

    def _views(self, blocks: Sequence[int], memory: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each part, and where its blocks' values are: [len(blocks), block_size, …]."""
        start = 0
        for part in self._parts:
            end = start + len(blocks) * part[0].nbytes
            view = memory[start:end].view(part.dtype).view(len(blocks), *part.shape[1:])
            yield part, view
            start = end
