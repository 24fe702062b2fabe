"""What the two ends of a link tell each other first, and when they refuse each other.

Knows Hello, Welcome and the rules of DESIGN section 4. Knows no stream and no memory: a grant of
memory is passed through as it is. Tiers grow and shrink while they serve, so how many processes the
other end believes there to be is no ground to refuse it; its rank is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_core.errors import ProtocolError
from moe_core.pb.epserve.v1 import expert_pb2 as pb
from moe_core.protocol import PROTOCOL_VERSIONS, common_version
from moe_core.transport.base import Identity, LinkSpec
from moe_core.transport.wire import dtype_name


@dataclass(frozen=True, slots=True)
class Agreement:
    """How this link will work: the outcome of a Hello that was accepted."""

    version: int
    transport: str
    reason: str


def make_hello(
    spec: LinkSpec,
    identity: Identity,
    peer: Identity,
    transports: Sequence[str],
    grant: pb.NixlGrant | None,
) -> pb.Hello:
    return pb.Hello(
        protocol_versions=PROTOCOL_VERSIONS,
        model_fingerprint=spec.model_fingerprint,
        attn_rank=identity.rank,
        attn_world=identity.world,
        dtype=dtype_name(spec.dtype),
        hidden_size=spec.hidden_size,
        num_columns=spec.num_columns,
        slot_count=spec.slot_count,
        slot_tokens=spec.slot_tokens,
        instance_epoch=identity.instance_epoch,
        transports=transports,
        nixl=grant,
        expert_rank=peer.rank,
        expert_world=peer.world,
    )


def accept_hello(
    hello: pb.Hello,
    spec: LinkSpec,
    identity: Identity,
    supported: dict[str, str],
    attention_world: int | None = None,
) -> Agreement:
    """The expert's side. `supported` maps each transport to "" or to why it is not to be had;
    `attention_world` is the cluster's number of attention processes, where it is known.

    Raises ProtocolError that names both sides' values of everything that differs.
    """
    version = common_version("attention", hello.protocol_versions, "expert")
    differences = list(_differences(hello, spec, identity))
    if attention_world is None and hello.attn_rank >= hello.attn_world:
        differences.append(
            f"attention rank {hello.attn_rank} is not below its world {hello.attn_world}"
        )
    elif attention_world is not None and hello.attn_rank >= attention_world:
        differences.append(
            f"attention rank {hello.attn_rank} is not below the {attention_world} attention "
            "processes that the gateway has told the expert side of"
        )
    if differences:
        raise ProtocolError(f"the hello does not fit: {'; '.join(differences)}")
    transport, reason = _choose(tuple(hello.transports), supported)
    return Agreement(version, transport, reason)


def _differences(hello: pb.Hello, spec: LinkSpec, identity: Identity) -> Iterable[str]:
    pairs = (
        ("model_fingerprint", hello.model_fingerprint, spec.model_fingerprint),
        ("dtype", hello.dtype, dtype_name(spec.dtype)),
        ("hidden_size", hello.hidden_size, spec.hidden_size),
        ("num_columns", hello.num_columns, spec.num_columns),
        ("slot_count", hello.slot_count, spec.slot_count),
        ("slot_tokens", hello.slot_tokens, spec.slot_tokens),
        ("expert rank", hello.expert_rank, identity.rank),
    )
    for name, theirs, ours in pairs:
        if theirs != ours:
            yield f"{name} is {theirs!r} on the attention side, {ours!r} on the expert side"


def _choose(offered: tuple[str, ...], supported: dict[str, str]) -> tuple[str, str]:
    """The first of `offered` that can be had, and why none before it."""
    passed_over: list[str] = []
    for name in offered:
        missing = supported.get(name, "unknown to the expert side")
        if not missing:
            return name, "; ".join(passed_over) or "both sides have it"
        passed_over.append(f"{name}: {missing}")
    raise ProtocolError(
        f"no transport in common: attention offers {list(offered)}, "
        f"expert says {'; '.join(passed_over) or 'nothing'}"
    )


def check_welcome(welcome: pb.Welcome, peer: Identity, offered: Sequence[str]) -> None:
    """The attention's side. Raises ProtocolError naming both values."""
    if welcome.protocol_version not in PROTOCOL_VERSIONS:
        raise ProtocolError(
            f"the welcome chose protocol version {welcome.protocol_version} "
            f"out of {list(PROTOCOL_VERSIONS)}"
        )
    if welcome.transport not in offered:
        raise ProtocolError(
            f"the welcome chose transport {welcome.transport!r} out of {list(offered)}"
        )
    if peer.instance_epoch not in (0, welcome.instance_epoch):
        raise ProtocolError(
            f"expert {peer.rank} is instance {welcome.instance_epoch}, "
            f"and instance {peer.instance_epoch} was wanted: it has been restarted"
        )
