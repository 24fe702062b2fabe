"""How an attention process gets its link to one expert process.

Knows which transports may be offered and what the answer means. Knows no tensor.
"""

import logging

from moe_core.errors import PeerLostError
from moe_core.pb.epserve.v1 import expert_pb2 as pb
from moe_core.service.certificates import Certificates, expecting
from moe_core.service.peer_roles import PeerRole
from moe_core.transport.base import ExpertLink, Identity, LinkSpec, TransportOptions
from moe_core.transport.choice import open_endpoint
from moe_core.transport.endpoint import NixlEndpoint
from moe_core.transport.grpc_link import GrpcLink
from moe_core.transport.handshake import check_welcome, make_hello
from moe_core.transport.nixl_link import NixlLink, attention_path
from moe_core.transport.stream import ExchangeStream

logger = logging.getLogger(__name__)
ALL = ("nixl", "grpc")
PROBE_TIMEOUT_S = 3.0


async def connect_link(
    address: str,
    spec: LinkSpec,
    identity: Identity,
    peer: Identity,
    options: TransportOptions,
    endpoint: NixlEndpoint | None = None,
    tls: Certificates | None = None,
) -> ExpertLink:
    """A link from attention process `identity` to expert process `peer` at `address`; `tls` is
    what this process shows of itself.

    `peer.instance_epoch` 0 means whichever start of it is there. A process with several links opens
    one `endpoint` (choice.open_endpoint) for all of them and closes it after them; without one,
    the link opens and closes its own.

    Raises ProtocolError when the two do not fit together, PeerTimeoutError or PeerLostError when
    the peer cannot be reached within `options.connect_timeout_s`, ConfigError when `options` ask
    for nixl and there is none.
    """
    connector = _Connector(address, spec, identity, peer, options, tls)
    if endpoint is not None and options.transport != "grpc":
        return await connector.over_nixl(endpoint, owns_endpoint=False)
    own, _ = open_endpoint(identity, options)
    if own is None:
        return await connector.over_grpc()
    link = None
    try:
        link = await connector.over_nixl(own, owns_endpoint=True)
        return link
    finally:
        if not isinstance(link, NixlLink):
            own.close()


class _Connector:
    """One attempt to reach one peer, and its fall back to grpc."""

    def __init__(
        self,
        address: str,
        spec: LinkSpec,
        identity: Identity,
        peer: Identity,
        options: TransportOptions,
        tls: Certificates | None,
    ) -> None:
        self._address = address
        self._security = expecting(tls, PeerRole.EXPERT)
        self._name = f"expert {peer.rank} ({address})"
        self._spec = spec
        self._identity = identity
        self._peer = peer
        self._options = options

    async def over_grpc(self) -> ExpertLink:
        stream = ExchangeStream(self._address, self._name, self._security)
        try:
            await self._greet(stream, ("grpc",), None)
        except BaseException:
            await stream.close(in_order=False)
            raise
        return GrpcLink(stream, self._spec)

    async def over_nixl(self, endpoint: NixlEndpoint, *, owns_endpoint: bool) -> ExpertLink:
        """By NIXL, or by grpc where the peer prefers that or NIXL does not get through and the
        options leave the choice."""
        path = attention_path(endpoint, self._spec, self._name)
        stream = ExchangeStream(self._address, self._name, self._security)
        only = self._options.transport == "nixl"
        try:
            welcome = await self._greet(stream, ("nixl",) if only else ALL, path.grant())
        except BaseException:
            await stream.close(in_order=False)
            path.close(in_order=True)
            raise
        if welcome.transport == "grpc":
            path.close(in_order=True)
            return GrpcLink(stream, self._spec)
        link = NixlLink(
            stream, self._spec, self._identity, endpoint, path, owns_endpoint=owns_endpoint
        )
        failure = await self._start(link, welcome.nixl)
        if failure is None:
            return link
        if only:
            raise PeerLostError(f"{self._name}: NIXL does not get through: {failure}")
        logger.warning("%s: NIXL does not get through (%s), using grpc", self._name, failure)
        return await self.over_grpc()

    async def _start(self, link: NixlLink, grant: pb.NixlGrant) -> str | None:
        """None, or why NIXL, which both ends have, does not get from one to the other."""
        started = False
        timeout_s = min(PROBE_TIMEOUT_S, self._options.connect_timeout_s)
        try:
            await link.start(grant, timeout_s)
            started = True
        except TimeoutError:
            return f"a write and its answer took more than {timeout_s:.3g} s"
        except PeerLostError as error:
            return str(error)
        finally:
            if not started:
                await link.close()
        return None

    async def _greet(
        self, stream: ExchangeStream, offered: tuple[str, ...], grant: pb.NixlGrant | None
    ) -> pb.Welcome:
        hello = make_hello(self._spec, self._identity, self._peer, offered, grant)
        welcome = await stream.greet(hello, self._options.connect_timeout_s)
        check_welcome(welcome, self._peer, offered)
        reason = welcome.transport_reason
        logger.info("%s: transport %s (%s)", self._name, welcome.transport, reason)
        return welcome
