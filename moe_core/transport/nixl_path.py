"""The two memories of one end of a NIXL link, and writing from one into the peer's.

Knows slots as byte ranges, the peer's grant, its doorbell, and what happens to the memory when
the link ends. Knows no tensor and no dispatch.
"""

import asyncio
import os
from functools import partial
from typing import Any

from moe_core.errors import ProtocolError, TransportError
from moe_core.pb.epserve.v1 import expert_pb2 as pb
from moe_core.transport.base import LinkCounters
from moe_core.transport.doorbell import Bell, LocalBell, StreamBell
from moe_core.transport.endpoint import Action, NixlEndpoint
from moe_core.transport.host import HostProcess
from moe_core.transport.layout import ALIGNMENT

MAX_METADATA_BYTES = 1 << 20
MAX_NAME_BYTES = 256
MAX_SOCKET_NAME = 107  # what an abstract unix socket's address leaves
ADDRESS_LIMIT = 1 << 64


def _is_doorbell(name: str) -> bool:
    return name.isascii() and len(name) <= MAX_SOCKET_NAME


class NixlPath:
    """`incoming` is granted to the peer, `outgoing` is what this end writes from. Both hold
    `slot_count` slots, and slot i here is slot i there."""

    def __init__(
        self,
        endpoint: NixlEndpoint,
        peer: str,
        slot_count: int,
        incoming_slot_bytes: int,
        outgoing_slot_bytes: int,
    ) -> None:
        """Raises TransportError when too much memory is retired already."""
        self.peer = peer
        self.link_id = 0
        self._endpoint = endpoint
        self._slot_count = slot_count
        self._incoming_bytes = incoming_slot_bytes
        self._outgoing_bytes = outgoing_slot_bytes
        self._num_bytes = slot_count * (incoming_slot_bytes + outgoing_slot_bytes)
        endpoint.retired.admit(self._num_bytes, peer)
        self.incoming = endpoint.allocate(slot_count * incoming_slot_bytes)
        self.outgoing = endpoint.allocate(slot_count * outgoing_slot_bytes)
        self._on_cuda = self.outgoing.is_cuda
        self._granted = endpoint.agent.register(self.incoming)
        self._source = endpoint.agent.register(self.outgoing)
        self._handles: list[tuple[int, Any] | None] = [None] * slot_count
        self._unfinished: dict[int, asyncio.Future[Exception | None] | None] = {}
        self._grant: pb.NixlGrant | None = None
        self._writer: HostProcess | None = None  # who may write into `incoming`
        self._bell: Bell | None = None
        self._counters = LinkCounters()
        self.failure: Exception | None = None

    def grant(self, link_id: int | None = None) -> pb.NixlGrant:
        """What the peer needs to write into `incoming`. The attention side names the link."""
        self.link_id = link_id or int.from_bytes(os.urandom(8), "little") | 1
        endpoint = self._endpoint
        process = endpoint.process
        return pb.NixlGrant(
            agent_name=endpoint.agent.name,
            agent_metadata=self._granted.metadata(),
            base_address=self._granted.address,
            slot_bytes=self._incoming_bytes,
            slot_count=self._slot_count,
            device_id=self._granted.device_id,
            memory_type=self._granted.memory_type,
            link_id=self.link_id,
            process=pb.HostProcess(
                host_id=process.host_id,
                pid=process.pid,
                start_ticks=process.start_ticks,
                doorbell=endpoint.doorbell.name,
                parked_fd=endpoint.doorbell.flag_fd,
            ),
        )

    def open(self, grant: pb.NixlGrant, ring_stream: Action, counters: LinkCounters) -> None:
        """Write to what the peer grants from now on. Raises ProtocolError naming the value that
        cannot be."""
        self._check(grant)
        self._endpoint.add_peer(grant.agent_name, grant.agent_metadata)
        self._grant = grant
        self.granted_to(grant.process)
        self._prove_range()
        self._counters = counters
        self._bell = self._bell_of(grant.process, ring_stream)

    def granted_to(self, process: pb.HostProcess) -> None:
        """From now on `process` may write into `incoming`; `open` says so of its peer."""
        self._writer = HostProcess(process.host_id, process.pid, process.start_ticks)

    def _check(self, grant: pb.NixlGrant) -> None:
        size = self._outgoing_bytes
        rules = (
            ("slot_count", grant.slot_count, grant.slot_count == self._slot_count),
            ("slot_bytes", grant.slot_bytes, grant.slot_bytes == size),
            (
                "base_address",
                grant.base_address,
                0 < grant.base_address < ADDRESS_LIMIT - self._slot_count * size,
            ),
            ("memory_type", grant.memory_type, grant.memory_type in ("DRAM", "VRAM")),
            ("agent_name", grant.agent_name, 0 < len(grant.agent_name) <= MAX_NAME_BYTES),
            (
                "agent_metadata",
                f"{len(grant.agent_metadata)} bytes",
                len(grant.agent_metadata) <= MAX_METADATA_BYTES,
            ),
            ("link_id", grant.link_id, grant.link_id == (self.link_id or grant.link_id) != 0),
            ("doorbell", grant.process.doorbell, _is_doorbell(grant.process.doorbell)),
        )
        for name, value, fits in rules:
            if not fits:
                raise ProtocolError(
                    f"{self.peer} grants memory with {name}={value!r}; this end has "
                    f"{self._slot_count} slots of {size} bytes, link {self.link_id}"
                )

    def _prove_range(self) -> None:
        """NIXL knows from the metadata what the peer has registered, and makes no handle for a
        write outside of it: the first and the last slot, whole, show that all are inside. Raises
        ProtocolError."""
        for slot in {0, self._slot_count - 1}:
            try:
                self._prepare(slot, self._outgoing_bytes)
            except TransportError as error:
                raise ProtocolError(
                    f"{self.peer} grants slot {slot} of {self._outgoing_bytes} bytes outside of "
                    f"the memory that it has registered: {error}"
                ) from None

    def _bell_of(self, process: pb.HostProcess, ring_stream: Action) -> Bell:
        if process.host_id == self._endpoint.process.host_id:
            try:
                return LocalBell(process.doorbell, process.pid, process.parked_fd)
            except (OSError, ValueError):  # another user's process, say, or no flag at all
                pass
        return StreamBell(ring_stream)

    @property
    def sender(self) -> str:
        """The peer's agent, as notifications name it."""
        return self._grant.agent_name if self._grant is not None else ""

    @property
    def unfinished(self) -> bool:
        return bool(self._unfinished)

    def write(self, slot: int, num_bytes: int, note: bytes) -> None:
        """Write the first `num_bytes` of `slot`, then deliver `note`; `written` says when it is
        done. An error is `failure` afterwards."""
        known = self._handles[slot]  # a finished handle can be posted again
        fits = known is not None and known[0] == num_bytes
        handle = known[1] if known is not None and fits else self._prepare(slot, num_bytes)
        if self._on_cuda:
            self._unfinished[slot] = None
            self._endpoint.after_copies(lambda: self._post(slot, handle, note))
        else:
            self._post(slot, handle, note)

    def _post(self, slot: int, handle: Any, note: bytes) -> None:  # noqa: ANN401
        try:
            done = self._endpoint.agent.post(handle, note)
        except self._endpoint.agent.failures as failure:
            self._unfinished.setdefault(slot)
            self._finished(slot, failure)
            return
        if done:
            self._finished(slot, None)
        else:
            self._unfinished.setdefault(slot)
            finished = partial(self._finished, slot)
            self._endpoint.follow(handle, finished, self._ring)

    def _prepare(self, slot: int, num_bytes: int) -> Any:  # noqa: ANN401
        """A handle for a write of another size than the slot's last."""
        known = self._handles[slot]
        if known is not None:
            self._endpoint.agent.release(known[1])
            self._handles[slot] = None
        grant = self._grant
        if grant is None:
            raise RuntimeError("write before open")
        handle = self._endpoint.agent.prepare_write(
            (
                self._source.address + slot * self._outgoing_bytes,
                max(num_bytes, ALIGNMENT),  # a note needs a write to follow
                self._source.device_id,
                self._source.memory_type,
            ),
            (
                grant.base_address + slot * self._outgoing_bytes,
                grant.device_id,
                grant.memory_type,
            ),
            grant.agent_name,
        )
        self._handles[slot] = (num_bytes, handle)
        return handle

    def _finished(self, slot: int, error: Exception | None) -> None:
        waiter = self._unfinished.get(slot)
        if error is None:
            self._unfinished.pop(slot, None)
            self._ring()
        else:
            self.failure = error
        if waiter is not None and not waiter.done():
            waiter.set_result(error)

    def _ring(self) -> None:
        if self._bell is not None and self._bell.ring():
            self._counters.doorbells += 1

    async def written(self, slot: int, deadline: float) -> None:
        """Until the write of `slot` is done. Raises TimeoutError, or what NIXL said."""
        if self.failure is None and slot in self._unfinished:
            waiter: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
            self._unfinished[slot] = waiter
            async with asyncio.timeout_at(deadline):
                await waiter
        if self.failure is not None:
            raise self.failure

    def give_up(self, error: TransportError) -> None:
        """Nobody waits for writes any more. Those that are not done are still on their way."""
        self.failure = self.failure or error
        for waiter in self._unfinished.values():
            if waiter is not None and not waiter.done():
                waiter.set_result(error)

    def close(self, *, in_order: bool) -> None:
        """The link has ended; `in_order` when the peer has said that its writes are all done."""
        if self._bell is not None:
            self._bell.close()
            self._bell = None
        if self._writer is None or (in_order and not self._unfinished):
            self._release()
            return
        self._endpoint.retired.add(self._num_bytes, self.peer, self._writer, self._release)

    def _release(self) -> None:
        for known in self._handles:
            if known is not None:
                self._endpoint.forget(known[1])
                self._endpoint.agent.release(known[1])
        self._handles.clear()
        if self._grant is not None:
            self._endpoint.remove_peer(self._grant.agent_name)
        self._granted.release()
        self._source.release()
