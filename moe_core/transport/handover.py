"""What both ends of a handover agree on.

Knows a unit (an expert, some KV blocks) as so many bytes, in pieces, and the numbers that name it.
Knows no stream, no memory, no tensor's shape.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

import torch
from blake3 import blake3

from moe_core.errors import ProtocolError
from moe_core.pb.epserve.v1 import expert_pb2 as pb
from moe_core.protocol import PROTOCOL_VERSIONS
from moe_core.transport.layout import align

# What is written or sent at once: an event loop that also serves is not kept from it for long.
PIECE_BYTES = 1 << 20
FETCH_TIMEOUT_S = 60.0  # for one unit

UnitName: TypeAlias = tuple[int, ...]
"""Of an expert: its layer and its logical id. Of KV blocks: their ids."""


class UnitKind(StrEnum):
    """The value is the field of HandoverRequest that names a unit of this kind."""

    EXPERT = "expert"
    KV_BLOCKS = "blocks"


@dataclass(frozen=True, slots=True)
class HandoverSpec:
    """What two processes must have in common. dtype as messages name it; shard_rank and shard_size:
    of the TP group; unit_bytes: of one unit; layout: of what the others do not determine."""

    model_fingerprint: str
    dtype: str
    shard_rank: int
    shard_size: int
    unit_bytes: int
    kind: UnitKind = UnitKind.EXPERT
    layout: str = ""

    @property
    def piece_bytes(self) -> int:
        return min(PIECE_BYTES, align(self.unit_bytes))

    @property
    def num_pieces(self) -> int:
        return -(-self.unit_bytes // self.piece_bytes)

    def pieces(self) -> Iterable[tuple[int, int]]:
        """(first byte, number of bytes) of each, in order."""
        for start in range(0, self.unit_bytes, self.piece_bytes):
            yield start, min(self.piece_bytes, self.unit_bytes - start)

    def hello(self, rank: int, transports: Iterable[str]) -> pb.HandoverHello:
        return pb.HandoverHello(
            protocol_versions=PROTOCOL_VERSIONS,
            model_fingerprint=self.model_fingerprint,
            dtype=self.dtype,
            shard_rank=self.shard_rank,
            shard_size=self.shard_size,
            unit_bytes=self.unit_bytes,
            layout=self.layout,
            transports=transports,
            rank=rank,
        )

    def check(self, hello: pb.HandoverHello) -> None:
        """Raises ProtocolError naming both sides' values of everything that differs."""
        names = ("model_fingerprint", "dtype", "shard_rank", "shard_size", "unit_bytes", "layout")
        differences = [
            f"{name} is {getattr(hello, name)!r} there and {getattr(self, name)!r} here"
            for name in names
            if getattr(hello, name) != getattr(self, name)
        ]
        if differences:
            raise ProtocolError(f"the hello does not fit: {'; '.join(differences)}")


def digest_of(content: torch.Tensor) -> bytes:
    """Blake3 of `content` [n] uint8. Takes a while for many bytes, and frees other threads."""
    return blake3(content.cpu().numpy().data).digest()


def name_to_pb(kind: UnitKind, name: UnitName) -> pb.HandoverRequest:
    if kind is UnitKind.EXPERT:
        layer_id, logical_id = name
        return pb.HandoverRequest(expert=pb.ExpertName(layer_id=layer_id, logical_id=logical_id))
    return pb.HandoverRequest(blocks=pb.KvBlocks(block_ids=name))


def name_from_pb(kind: UnitKind, request: pb.HandoverRequest) -> UnitName:
    """Raises ProtocolError for what names no unit of this kind."""
    if request.WhichOneof("kind") != kind:
        raise ProtocolError(
            f"a handover wants {kind.value!r} here, not {request.WhichOneof('kind')!r}"
        )
    if kind is UnitKind.EXPERT:
        return request.expert.layer_id, request.expert.logical_id
    return tuple(request.blocks.block_ids)
