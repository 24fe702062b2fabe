"""What gateways that share a registry write there: themselves, and the layout in force.

Knows the two records and their bytes. Knows no registry and no key.
"""

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from moe_core.cluster import Member
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ProtocolError
from moe_core.pb.epserve.v1 import cluster_pb2 as pb
from moe_core.placement import ExpertPlacement
from moe_core.service.cluster_codec import member_from_pb, member_to_pb
from moe_core.service.layout_codec import (
    parallel_from_pb,
    parallel_to_pb,
    placement_from_pb,
    placement_to_pb,
)


@dataclass(frozen=True, slots=True)
class SharedLayout:
    """last_epoch: the largest placement epoch that was ever given out, used or taken back."""

    placement: ExpertPlacement
    parallel: ParallelConfig
    last_epoch: int
    fingerprint: str

    def encode(self) -> bytes:
        return pb.SharedLayout(
            placement=placement_to_pb(self.placement),
            parallel=parallel_to_pb(self.parallel),
            last_epoch=self.last_epoch,
            model_fingerprint=self.fingerprint,
        ).SerializeToString()

    @classmethod
    def decode(cls, value: bytes) -> "SharedLayout":
        """Raises ProtocolError for what no gateway has written."""
        message = pb.SharedLayout()
        _parse(message, value)
        return cls(
            placement_from_pb(message.placement),
            parallel_from_pb(message.parallel),
            message.last_epoch,
            message.model_fingerprint,
        )


@dataclass(frozen=True, slots=True)
class GatewayRecord:
    """cluster_address: where workers and other gateways reach it."""

    member: Member
    cluster_address: str

    @property
    def name(self) -> str:
        return f"gateway {self.member.rank} at {self.member.address}"

    def encode(self) -> bytes:
        return pb.GatewayRecord(
            member=member_to_pb(self.member), cluster_address=self.cluster_address
        ).SerializeToString()

    @classmethod
    def decode(cls, value: bytes) -> "GatewayRecord":
        """Raises ProtocolError for what no gateway has written."""
        message = pb.GatewayRecord()
        _parse(message, value)
        return cls(member_from_pb(message.member), message.cluster_address)


def _parse(message: pb.SharedLayout | pb.GatewayRecord, value: bytes) -> None:
    try:
        message.ParseFromString(value)
    except DecodeError as error:
        raise ProtocolError(
            f"the registry holds {len(value)} bytes that are no {type(message).__name__}: {error}; "
            "give this cluster a name of its own there (etcd://HOST:PORT/NAME)"
        ) from None
