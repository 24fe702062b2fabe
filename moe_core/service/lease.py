"""A thread that tells the gateway, every second, when the event loop last made progress, and how
many tasks it had then.

Knows the loop's heartbeat and ClusterService.Lease. Touches neither torch nor NIXL and never
waits for the loop, so it goes on while the loop is busy or hung. What follows from a lease or
its absence is the gateway's business; here a lease that cannot be delivered is only noted, since
the registration stream is what tells that the gateway is gone.
"""

import asyncio
import threading
import time

import grpc
import structlog

from moe_core.cluster import Role
from moe_core.pb.epserve.v1 import cluster_pb2
from moe_core.pb.epserve.v1.cluster_pb2_grpc import ClusterServiceStub
from moe_core.service.certificates import ServerCheck
from moe_core.service.cluster_codec import role_to_pb
from moe_core.service.grpc_channel import channel_options, server_name_options

log = structlog.get_logger(__name__)

PERIOD_S = 1.0
# A lease that was lost is followed by another before its member counts as lost (3 s).
TIMEOUT_S = 0.75
RETRY_S = 0.25
BEAT_S = 0.25


class Lease:
    """Runs from its making until `stop`; make it on the event loop that it watches."""

    def __init__(
        self,
        gateway_address: str,
        security: ServerCheck | None,
        role: Role,
        rank: int,
        instance_epoch: int,
    ) -> None:
        self._gateway_address = gateway_address
        self._security = security
        self._role = role
        self._rank = rank
        self._instance_epoch = instance_epoch
        self._stopped = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._beat()
        self._thread = threading.Thread(target=self._send_leases, name="lease", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; returns at once, the thread ends within a second. Safe to call twice."""
        self._stopped.set()
        self._next_beat.cancel()

    def _beat(self) -> None:
        self._last_beat, self._num_tasks = time.monotonic(), len(asyncio.all_tasks(self._loop))
        self._next_beat = self._loop.call_later(BEAT_S, self._beat)

    def _send_leases(self) -> None:
        pause_s = PERIOD_S
        while not self._stopped.wait(pause_s):
            with self._open_channel() as channel:
                self._send_until_lost(channel)
            pause_s = RETRY_S

    def _open_channel(self) -> grpc.Channel:
        options: list[tuple[str, int | str]] = list(channel_options())
        if self._security is None:
            return grpc.insecure_channel(self._gateway_address, options=options)
        options += server_name_options(self._security)
        credentials = self._security.certificates.channel_credentials()
        return grpc.secure_channel(self._gateway_address, credentials, options=options)

    def _send_until_lost(self, channel: grpc.Channel) -> None:
        """A channel shows the certificate that it was opened with, so a lost one is opened anew."""
        stub = ClusterServiceStub(channel)  # type: ignore[no-untyped-call]  # generated code
        while True:
            try:
                stub.Lease(self._request(), timeout=TIMEOUT_S)
            except grpc.RpcError as error:
                log.debug("a lease was not delivered", reason=str(error))
                return
            if self._stopped.wait(PERIOD_S):
                return

    def _request(self) -> cluster_pb2.LeaseRequest:
        return cluster_pb2.LeaseRequest(
            role=role_to_pb(self._role),
            rank=self._rank,
            instance_epoch=self._instance_epoch,
            loop_idle_ms=int((time.monotonic() - self._last_beat) * 1000),
            loop_tasks=self._num_tasks,
        )
