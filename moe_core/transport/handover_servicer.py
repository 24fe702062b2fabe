"""The giving end of handovers: a service's `Handover`, one stream per process that fetches.

Knows streams, pieces and where they go. Knows neither experts nor KV blocks: a source fills memory
with a unit's bytes.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc.aio
import torch

from moe_core.errors import (
    PeerLostError,
    PeerTimeoutError,
    ProtocolError,
    TooManyRequestsError,
    UnavailableError,
)
from moe_core.pb.epserve.v1 import expert_pb2 as pb
from moe_core.protocol import common_version
from moe_core.transport.base import LinkCounters
from moe_core.transport.endpoint import NixlEndpoint
from moe_core.transport.handover import (
    FETCH_TIMEOUT_S,
    HandoverSpec,
    UnitKind,
    UnitName,
    name_from_pb,
)
from moe_core.transport.layout import ALIGNMENT
from moe_core.transport.nixl_path import NixlPath
from moe_core.transport.wire import tensor_bytes

MAX_HANDOVERS = 8  # at a time; each holds one unit's bytes
RETRY_AFTER_S = 1.0
HELLO_TIMEOUT_S = 10.0
NOTE = b"handover"

Context = grpc.aio.ServicerContext[pb.HandoverRequest, pb.HandoverResponse]
FillUnit = Callable[[UnitName, torch.Tensor], Awaitable[bytes | None]]
"""Of a unit's name and memory [unit_bytes] uint8: fills that with the unit's bytes and returns
their digest, or None where the unit is not held. Must not keep the loop."""
Release = Callable[[str], bool]
"""Of a sequence's id: nobody wants its KV blocks any more; whether they were kept until now."""


class HandoverServicer:
    """Built and used on the server's event loop. `endpoint` None: everything goes by grpc."""

    def __init__(
        self,
        spec: HandoverSpec,
        fill: FillUnit,
        instance_epoch: int,
        endpoint: NixlEndpoint | None,
        release: Release | None = None,
        max_handovers: int = MAX_HANDOVERS,
    ) -> None:
        self._spec = spec
        self._fill = fill
        self._release = release
        self._max_handovers = max_handovers
        self._instance_epoch = instance_epoch
        self._endpoint = endpoint
        self._running: set[asyncio.Task[None]] = set()

    async def Handover(self, request_iterator: Any, context: Context) -> None:  # noqa: ANN401
        if len(self._running) >= self._max_handovers:
            raise TooManyRequestsError(
                f"{self._max_handovers} handovers are under way here already", RETRY_AFTER_S
            )
        running = asyncio.create_task(self._serve(context), name="handover")
        self._running.add(running)
        try:
            await asyncio.wait({running})
        finally:
            running.cancel()
            await asyncio.wait({running})
            self._running.discard(running)
        if running.cancelled():
            raise UnavailableError("this process is closing")
        running.result()

    async def close(self) -> None:
        """End all handovers; whoever fetches sees UNAVAILABLE."""
        running = tuple(self._running)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    async def _serve(self, context: Context) -> None:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = await _read(context, "hello")
        except TimeoutError:
            raise ProtocolError("no hello came") from None
        if hello is None:
            return
        self._spec.check(hello.hello)
        tier = "attn" if self._spec.kind is UnitKind.KV_BLOCKS else "expert"
        name = f"{tier} {hello.hello.rank}"
        version = common_version(name, hello.hello.protocol_versions, "the giving process")
        peer = f"{name} ({context.peer()})"
        transport = self._transport(tuple(hello.hello.transports))
        endpoint = self._endpoint if transport == "nixl" else None
        await context.write(pb.HandoverResponse(welcome=self._welcome(version, endpoint)))
        if endpoint is None:
            await self._give(context, _ByStream(self._spec, context))
            return
        grant = await _read(context, "grant")
        if grant is not None:
            with _by_writes(self._spec, endpoint, peer, grant.grant) as outlet:
                await self._give(context, outlet)

    def _transport(self, offered: tuple[str, ...]) -> str:
        for name in offered:
            if name == "grpc" or (name == "nixl" and self._endpoint is not None):
                return name
        raise ProtocolError(f"no transport in common: {list(offered)} is offered, grpc is here")

    def _welcome(self, version: int, endpoint: NixlEndpoint | None) -> pb.HandoverWelcome:
        welcome = pb.HandoverWelcome(
            protocol_version=version,
            transport="grpc" if endpoint is None else "nixl",
            instance_epoch=self._instance_epoch,
        )
        if endpoint is not None:
            process = endpoint.process
            welcome.agent_name = endpoint.agent.name
            welcome.process.host_id = process.host_id
            welcome.process.pid = process.pid
            welcome.process.start_ticks = process.start_ticks
        return welcome

    async def _give(self, context: Context, outlet: "_ByStream | _ByWrites") -> None:
        while (request := await _read(context)) is not None:
            if self._release is not None and request.WhichOneof("kind") == "release":
                sent = pb.UnitSent(held=self._release(request.release))
            else:
                sent = await self._send(request, outlet)
            await context.write(pb.HandoverResponse(sent=sent))

    async def _send(
        self, request: pb.HandoverRequest, outlet: "_ByStream | _ByWrites"
    ) -> pb.UnitSent:
        digest = await self._fill(name_from_pb(self._spec.kind, request), outlet.memory)
        if digest is not None:
            await outlet.send()
        return pb.UnitSent(held=digest is not None, blake3=digest or b"")


async def _read(context: Context, kind: str | None = None) -> pb.HandoverRequest | None:
    """The next request, which must be a `kind` if one is named; None at the end. Raises
    ProtocolError."""
    request = await context.read()
    if not isinstance(request, pb.HandoverRequest):
        return None
    if kind is not None and request.WhichOneof("kind") != kind:
        raise ProtocolError(f"a handover wants a {kind} here, not {request.WhichOneof('kind')}")
    return request


class _ByStream:
    def __init__(self, spec: HandoverSpec, context: Context) -> None:
        self._spec = spec
        self._context = context
        self.memory = torch.empty(spec.unit_bytes, dtype=torch.uint8)

    async def send(self) -> None:
        for start, length in self._spec.pieces():
            part = tensor_bytes(self.memory[start : start + length])
            await self._context.write(pb.HandoverResponse(part=part))


class _ByWrites:
    def __init__(self, spec: HandoverSpec, endpoint: NixlEndpoint, path: NixlPath) -> None:
        self._spec = spec
        self._failures = endpoint.agent.failures
        self._path = path
        self.memory = path.outgoing[: spec.unit_bytes]

    async def send(self) -> None:
        """Piece by piece; others have their turn in between."""
        deadline = asyncio.get_running_loop().time() + FETCH_TIMEOUT_S
        peer = self._path.peer
        try:
            for slot, (_, length) in enumerate(self._spec.pieces()):
                self._path.write(slot, length, NOTE)
                await self._path.written(slot, deadline)
                await asyncio.sleep(0)
        except TimeoutError:
            raise PeerTimeoutError(
                f"{peer}: a unit of {self._spec.unit_bytes} bytes was not written within "
                f"{FETCH_TIMEOUT_S:g} s, phase: network"
            ) from None
        except self._failures as error:
            raise PeerLostError(f"{peer} is gone (NIXL says {error})") from None


@contextmanager
def _by_writes(
    spec: HandoverSpec, endpoint: NixlEndpoint, peer: str, grant: pb.NixlGrant
) -> Iterator[_ByWrites]:
    path = NixlPath(endpoint, peer, spec.num_pieces, ALIGNMENT, spec.piece_bytes)
    try:
        path.open(grant, lambda: None, LinkCounters())
        yield _ByWrites(spec, endpoint, path)
    finally:
        # Nobody was granted `incoming`; what is unfinished keeps `outgoing`.
        path.close(in_order=True)
