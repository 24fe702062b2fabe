"""Whether this process has NIXL, and what follows from that.

Knows TransportOptions. Knows no peer: what both ends agree on is handshake.py's.
"""

import logging

from moe_core.errors import ConfigError
from moe_core.transport.base import Identity, TransportOptions
from moe_core.transport.endpoint import NixlEndpoint
from moe_core.transport.nixl_agent import NixlUnavailable

logger = logging.getLogger(__name__)


def open_endpoint(identity: Identity, options: TransportOptions) -> tuple[NixlEndpoint | None, str]:
    """An endpoint, or why there is none. Raises ConfigError where nixl was asked for by name."""
    if options.transport == "grpc":
        return None, "grpc was asked for"
    try:
        return NixlEndpoint(identity, options), ""
    except NixlUnavailable as error:
        if options.transport == "nixl":
            raise ConfigError("transport", "nixl", str(error), ("auto", "grpc")) from None
        logger.info("transport auto: nixl is not to be had here (%s), using grpc", error)
        return None, str(error)


def offered_transports(options: TransportOptions, endpoint: NixlEndpoint | None) -> tuple[str, ...]:
    """What this end of a handover may use, in order of preference."""
    if endpoint is None:
        return ("grpc",)
    return ("nixl",) if options.transport == "nixl" else ("nixl", "grpc")
