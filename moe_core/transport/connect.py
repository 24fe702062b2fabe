"""How an attention process gets its link to one expert process.

Knows which transports may be offered and what the answer means. Knows no tensor.
"""

import logging

from moe_core.transport.base import ExpertLink, Identity, LinkSpec, TransportOptions
from moe_core.transport.grpc_link import GrpcLink
from moe_core.transport.handshake import check_welcome, make_hello
from moe_core.transport.stream import ExchangeStream

logger = logging.getLogger(__name__)


async def connect_link(
    address: str,
    spec: LinkSpec,
    identity: Identity,
    peer: Identity,
    options: TransportOptions,
) -> ExpertLink:
    """A link from attention process `identity` to expert process `peer` at `address`.

    `peer.instance_epoch` 0 means whichever start of it is there. Raises ProtocolError when the two
    do not fit together, PeerTimeoutError or PeerLostError when the peer cannot be reached within
    `options.connect_timeout_s`.
    """
    name = f"expert {peer.rank} ({address})"
    stream = ExchangeStream(address, name)
    offered = ("grpc",)
    try:
        hello = make_hello(spec, identity, peer, offered, None)
        welcome = await stream.greet(hello, options.connect_timeout_s)
        check_welcome(welcome, peer, offered)
    except BaseException:
        await stream.close(in_order=False)
        raise
    logger.info("%s: transport %s (%s)", name, welcome.transport, welcome.transport_reason)
    return GrpcLink(stream, spec)
