"""The receiving end of handovers: one stream to one process that holds what is wanted.

Knows streams, and memory that the giver may write. Knows neither experts nor KV blocks: what comes
are bytes and their digest, which whoever asked checks.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

import grpc
import torch

from moe_core.errors import EpserveError, PeerLostError, PeerTimeoutError, ProtocolError
from moe_core.pb.epserve.v1 import expert_pb2 as pb
from moe_core.pb.epserve.v1 import expert_pb2_grpc as rpc
from moe_core.pb.epserve.v1.attention_pb2_grpc import AttentionServiceStub
from moe_core.protocol import PROTOCOL_VERSIONS
from moe_core.service.certificates import ServerCheck
from moe_core.service.grpc_channel import error_from_status, open_channel
from moe_core.transport.endpoint import NixlEndpoint
from moe_core.transport.handover import (
    FETCH_TIMEOUT_S,
    HandoverSpec,
    UnitKind,
    UnitName,
    name_to_pb,
)
from moe_core.transport.layout import ALIGNMENT
from moe_core.transport.nixl_path import NixlPath
from moe_core.transport.stream import STREAM_FAILURES

Answer = TypeVar("Answer")
GREETING_TIMEOUT_S = 10.0


class _Poller:
    """While it is attached the endpoint polls often: a giver's first write needs us to."""

    busy = True

    def received(self, note: bytes) -> None:
        """The answer on the stream says more."""


class UnitFetch:
    """One at a time; after an error it is of no use but to be closed."""

    def __init__(
        self, address: str, peer: str, spec: HandoverSpec, security: ServerCheck | None
    ) -> None:
        """`peer` as errors name it."""
        self.peer = peer
        self.transport = ""
        self._spec = spec
        self._channel = open_channel(address, security)
        stub: Any = rpc.ExpertServiceStub  # generated without annotations
        if spec.kind is UnitKind.KV_BLOCKS:
            stub = AttentionServiceStub
        self._call: Any = stub(self._channel).Handover()
        self._endpoint: NixlEndpoint | None = None
        self._path: NixlPath | None = None
        self._giver = ""  # its agent
        self._poller = _Poller()
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._under_way = False

    async def open(
        self, rank: int, transports: tuple[str, ...], endpoint: NixlEndpoint | None
    ) -> None:
        """`transports` in order of preference; `endpoint` is there if nixl is among them. Raises
        TransportError or what the peer answers."""
        greeting = self._greet(rank, transports, endpoint)
        await self._in_time(greeting, GREETING_TIMEOUT_S, "the greeting")

    async def _greet(
        self, rank: int, transports: tuple[str, ...], endpoint: NixlEndpoint | None
    ) -> None:
        await self._call.write(pb.HandoverRequest(hello=self._spec.hello(rank, transports)))
        welcome = (await self._read("welcome")).welcome
        if welcome.protocol_version not in PROTOCOL_VERSIONS or welcome.transport not in transports:
            raise ProtocolError(
                f"{self.peer} chose version {welcome.protocol_version} and transport "
                f"{welcome.transport!r} out of {list(PROTOCOL_VERSIONS)} and {list(transports)}"
            )
        self.transport = welcome.transport
        if endpoint is None or welcome.transport != "nixl":
            self._memory = torch.empty(self._spec.unit_bytes, dtype=torch.uint8)
        else:
            await self._grant(endpoint, welcome)

    async def _grant(self, endpoint: NixlEndpoint, welcome: pb.HandoverWelcome) -> None:
        spec = self._spec
        path = NixlPath(endpoint, self.peer, spec.num_pieces, spec.piece_bytes, ALIGNMENT)
        self._path, self._endpoint = path, endpoint
        self._giver = welcome.agent_name
        self._memory = path.incoming[: spec.unit_bytes]
        path.granted_to(welcome.process)
        endpoint.attach(self._giver, self._poller)
        await self._call.write(pb.HandoverRequest(grant=path.grant()))

    async def fetch(self, name: UnitName, what: str) -> tuple[torch.Tensor, bytes] | None:
        """[unit_bytes] uint8 and the digest that they ought to have; None where the peer does
        not hold the unit, `what` as errors name it. The tensor is valid until the next call of this
        object. Raises TransportError or what the peer answers."""
        what = f"{what}, {self._spec.unit_bytes} bytes,"
        self._under_way = True
        asking = self._ask(name_to_pb(self._spec.kind, name))
        sent = await self._in_time(asking, FETCH_TIMEOUT_S, what)
        self._under_way = False
        return (self._memory, sent.blake3) if sent.held else None

    async def release(self, sequence_id: str) -> bool:
        """Whether the peer kept this sequence's KV blocks until now. Raises as `fetch`."""
        request = pb.HandoverRequest(release=sequence_id)
        await self._in_time(self._call.write(request), GREETING_TIMEOUT_S, "the release")
        answer = await self._in_time(self._read("sent"), GREETING_TIMEOUT_S, "the release")
        return bool(answer.sent.held)

    async def _ask(self, request: pb.HandoverRequest) -> pb.UnitSent:
        await self._call.write(request)
        received = 0
        while (answer := await self._read("part", "sent")).WhichOneof("kind") == "part":
            received = self._take(answer.part, received)
        sent: pb.UnitSent = answer.sent
        wanted = self._spec.unit_bytes if self._path is None and sent.held else 0
        if received != wanted:
            raise ProtocolError(f"{self.peer} sent {received} of {wanted} bytes on the stream")
        return sent

    def _take(self, part: bytes, received: int) -> int:
        end = received + len(part)
        if self._path is not None or end > self._spec.unit_bytes:
            raise ProtocolError(
                f"{self.peer} sent {end} bytes on the stream of a unit of "
                f"{self._spec.unit_bytes}, transport {self.transport}"
            )
        self._memory[received:end] = torch.frombuffer(bytearray(part), dtype=torch.uint8)
        return end

    async def _read(self, *kinds: str) -> pb.HandoverResponse:
        answer = await self._call.read()
        if not isinstance(answer, pb.HandoverResponse):
            raise await self._ended()
        if answer.WhichOneof("kind") not in kinds:
            raise ProtocolError(f"{self.peer} answered with {answer.WhichOneof('kind')}")
        return answer

    async def _in_time(self, work: Awaitable[Answer], timeout_s: float, what: str) -> Answer:
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError:
            raise PeerTimeoutError(
                f"{self.peer}: {what} took more than {timeout_s:g} s, phase: network"
            ) from None
        except STREAM_FAILURES:
            raise await self._ended() from None

    async def _ended(self) -> EpserveError:
        code, details = await self._call.code(), await self._call.details()
        message = f"{self.peer} ended the handover: {details or 'without a word'}"
        if code is grpc.StatusCode.OK:
            return PeerLostError(message)
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            return ProtocolError(message)
        return error_from_status(code.name, message)

    async def close(self) -> None:
        """Does not fail."""
        self._call.cancel()
        await self._channel.close(None)
        if self._path is None or self._endpoint is None:
            return
        self._endpoint.detach(self._giver, self._poller)
        # A giver has said that its writes are done, or it may still write for as long as it lives.
        self._path.close(in_order=not self._under_way)
        self._path = None
