"""The roles that certificates name, and which of them the other end of a call has shown.

Knows how a role is written in a certificate, and gRPC's authentication context. Knows no file and
no rule about who may do what.

A role stands in the subject alternative names twice: as the URI `epserve://ROLE`, which servers
read, and as the DNS name `ROLE.epserve`, which the TLS library of a client checks, since it checks
names of hosts only.
"""

from enum import StrEnum
from typing import Any

from moe_core.errors import AccessError

URI_PREFIX = "epserve://"
NAMES = "x509_subject_alternative_name"


class PeerRole(StrEnum):
    GATEWAY = "gateway"
    ATTN = "attn"
    EXPERT = "expert"
    CLIENT = "client"
    ADMIN = "admin"

    @property
    def uri(self) -> str:
        return URI_PREFIX + self.value

    @property
    def dns_name(self) -> str:
        return f"{self.value}.epserve"


def shown_roles(context: Any) -> frozenset[PeerRole] | None:  # noqa: ANN401 - grpc.aio's context
    """The roles of the caller's certificate, which TLS has verified; none where it showed no
    certificate. None where the connection is not TLS at all."""
    properties = context.auth_context()
    if b"ssl" not in properties.get("transport_security_type", ()):
        return None
    names = {name.decode(errors="replace") for name in properties.get(NAMES, ())}
    return frozenset(role for role in PeerRole if role.uri in names)


def require_role(context: Any, role: PeerRole, what: str) -> None:  # noqa: ANN401
    """Raises AccessError unless the caller has shown `role`, or nobody shows any here."""
    roles = shown_roles(context)
    if roles is not None and role not in roles:
        raise AccessError(f"{what} needs a certificate with {role.uri}; {in_words(roles)}")


def in_words(roles: frozenset[PeerRole]) -> str:
    if not roles:
        return (
            "this connection has shown no role (the gateway asks for certificates on its "
            "--cluster-port)"
        )
    return "this connection has shown " + ", ".join(sorted(role.uri for role in roles))
