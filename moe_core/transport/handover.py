"""What both ends of a handover of experts agree on.

Knows an expert as so many bytes, in pieces. Knows no stream, no memory, no tensor's shape.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from blake3 import blake3

from moe_core.errors import ProtocolError
from moe_core.pb.epserve.v1 import expert_pb2 as pb
from moe_core.protocol import PROTOCOL_VERSIONS
from moe_core.transport.layout import align

# What is written or sent at once: an event loop that also serves is not kept from it for long.
PIECE_BYTES = 1 << 20
FETCH_TIMEOUT_S = 60.0  # for one expert


@dataclass(frozen=True, slots=True)
class HandoverSpec:
    """What two processes' experts must have in common. dtype as messages name it; expert_bytes:
    one expert's, w13 and then w2."""

    model_fingerprint: str
    dtype: str
    etp_rank: int
    etp_size: int
    expert_bytes: int

    @property
    def piece_bytes(self) -> int:
        return min(PIECE_BYTES, align(self.expert_bytes))

    @property
    def num_pieces(self) -> int:
        return -(-self.expert_bytes // self.piece_bytes)

    def pieces(self) -> Iterable[tuple[int, int]]:
        """(first byte, number of bytes) of each, in order."""
        for start in range(0, self.expert_bytes, self.piece_bytes):
            yield start, min(self.piece_bytes, self.expert_bytes - start)

    def hello(self, rank: int, transports: Iterable[str]) -> pb.HandoverHello:
        return pb.HandoverHello(
            protocol_versions=PROTOCOL_VERSIONS,
            model_fingerprint=self.model_fingerprint,
            dtype=self.dtype,
            etp_rank=self.etp_rank,
            etp_size=self.etp_size,
            expert_bytes=self.expert_bytes,
            transports=transports,
            rank=rank,
        )

    def check(self, hello: pb.HandoverHello) -> None:
        """Raises ProtocolError naming both sides' values of everything that differs."""
        names = ("model_fingerprint", "dtype", "etp_rank", "etp_size", "expert_bytes")
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
