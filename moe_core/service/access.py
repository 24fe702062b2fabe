"""Who may call which method: the one table, asked before anything of a call is parsed.

Knows services' names, roles and that a key is somebody's to check. Knows no key and no message.
A service that has no rule cannot be added to a server, so a new one cannot be forgotten; a new
method has its service's rule.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from moe_core.errors import AccessError
from moe_core.service.peer_roles import PeerRole, in_words, shown_roles


class Authenticated(Protocol):
    """Who has shown a good key, or anybody where none is asked for (`anonymous`)."""

    @property
    def admin(self) -> bool: ...

    @property
    def anonymous(self) -> bool: ...


Authenticate = Callable[[str | None], Authenticated]
"""From the `authorization` metadata to who that is; raises AuthenticationError."""

AUTHORIZATION = "authorization"


@dataclass(frozen=True, slots=True)
class Rule:
    """`roles`: over TLS, the certificates of which one is needed; None: no certificate is.
    `key`: an API key, on a server that has keys; one that has none wants an administrator's
    certificate instead. `admin`: an administrator's certificate or key; nothing in the clear on a
    server that asks nobody for a key."""

    roles: frozenset[PeerRole] | None = None
    key: bool = False
    admin: bool = False


def _only(*roles: PeerRole) -> Rule:
    return Rule(frozenset(roles))


EVERYBODY = Rule()
KEY = Rule(key=True)
ADMINISTRATORS = Rule(admin=True)
WORKERS = _only(PeerRole.ATTN, PeerRole.EXPERT, PeerRole.GATEWAY)

RULES: Mapping[str, Rule] = {
    "grpc.health.v1.Health": EVERYBODY,
    "grpc.reflection.v1alpha.ServerReflection": KEY,
    "epserve.v1.Gateway": KEY,
    "vllm.grpc.engine.VllmEngine": KEY,
    "epserve.v1.Admin": ADMINISTRATORS,
    "epserve.v1.ClusterService": WORKERS,
    "/epserve.v1.ClusterService/FollowLeader": _only(PeerRole.GATEWAY),
    "epserve.v1.AttentionService": _only(PeerRole.GATEWAY),
    "/epserve.v1.AttentionService/Follow": _only(PeerRole.ATTN),
    "/epserve.v1.AttentionService/Handover": _only(PeerRole.ATTN),
    "/epserve.v1.AttentionService/FetchBlocks": _only(PeerRole.ATTN),
    "epserve.v1.ExpertService": _only(PeerRole.ATTN),
    "/epserve.v1.ExpertService/Handover": _only(PeerRole.EXPERT),
}


def require_rule(service: str) -> None:
    """Raises LookupError for a service that nobody has thought about."""
    if service not in RULES:
        raise LookupError(f"{service} has no rule in {__name__}.RULES: say who may call it")


_caller: ContextVar[object] = ContextVar("caller")


def calling() -> object:
    """Who makes the call that this runs in, as `authenticate` has said: for methods whose rule
    asks for a key."""
    return _caller.get()


class AccessCheck:
    """`authenticate` None: this server has no keys of its own."""

    def __init__(self, authenticate: Authenticate | None) -> None:
        self._authenticate = authenticate

    def check(self, path: str, context: Any) -> None:  # noqa: ANN401 - grpc.aio's context
        """Before `path` (/SERVICE/METHOD) runs. Raises AccessError or AuthenticationError."""
        rule = RULES.get(path) or RULES[path.split("/")[1]]
        if rule.admin:
            self._check_administrator(path, context)
        roles = rule.roles
        if rule.key and self._authenticate is None:
            roles = frozenset({PeerRole.ADMIN})
        if roles is not None:
            self._check_roles(path, roles, context)
        if rule.key and self._authenticate is not None:
            _caller.set(self._authenticate(authorization(context)))

    def _check_administrator(self, path: str, context: Any) -> None:  # noqa: ANN401
        shown = shown_roles(context)
        if shown is not None and PeerRole.ADMIN in shown:
            return
        needs = f"{path} needs a certificate with {PeerRole.ADMIN.uri}"
        if self._authenticate is None:
            if shown is not None:
                raise AccessError(f"{needs}; {in_words(shown)}")
            return
        caller = self._authenticate(authorization(context))
        if not (caller.admin or (shown is None and caller.anonymous)):
            raise AccessError(f"{needs}, or an API key that is an administrator's (admin: true)")

    def _check_roles(self, path: str, roles: frozenset[PeerRole], context: Any) -> None:  # noqa: ANN401
        shown = shown_roles(context)
        if shown is not None and not shown & roles:
            needed = " or ".join(sorted(role.uri for role in roles))
            raise AccessError(f"{path} needs a certificate with {needed}; {in_words(shown)}")


def authorization(context: Any) -> str | None:  # noqa: ANN401
    """What the caller sent as `authorization`, the first if there are several."""
    return sent_metadata(context, AUTHORIZATION)


def sent_metadata(context: Any, name: str) -> str | None:  # noqa: ANN401
    """What the caller sent under `name`, the first if there are several."""
    for key, value in context.invocation_metadata() or ():
        if key == name:
            return value if isinstance(value, str) else None
    return None
