"""Every method of every port refuses whoever has not shown what it needs.

The methods are found by reflection, and the expectation is of all of them but what is named here:
a new one is refused like its neighbours, or fails these tests.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from attn_service.servicer import SERVICE_NAME, AttentionServicer, add_to_server
from expert_service.servicer import ExchangeGate
from gateway.api_keys import ApiKeys, hash_of, new_key
from gateway.requests import Chunk, GenerationRequest
from moe_core.cluster import Join, Role
from moe_core.errors import AccessError
from moe_core.pb.epserve.v1.cluster_pb2 import LeaseRequest
from moe_core.pb.epserve.v1.cluster_pb2_grpc import ClusterServiceStub
from moe_core.pb.epserve.v1.gateway_pb2 import GenerateRequest
from moe_core.service.access import RULES
from moe_core.service.addresses import host_id, new_instance_epoch
from moe_core.service.certificates import Certificates, expecting
from moe_core.service.cluster_codec import role_to_pb
from moe_core.service.grpc_channel import open_channel
from moe_core.service.grpc_host import GrpcHost
from moe_core.service.membership import Membership
from moe_core.service.peer_roles import PeerRole
from support.certificates import CertificateAuthority, Pem
from support.every_method import Metadata, all_methods, answer_of, channel_to
from support.small_gateway import FINGERPRINT, SmallGateway

UNAUTHENTICATED, DENIED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
NO_CONNECTION = grpc.StatusCode.UNAVAILABLE
HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/"
VLLM = "/vllm.grpc.engine.VllmEngine/"
GATEWAY, ATTN, EXPERT = PeerRole.GATEWAY, PeerRole.ATTN, PeerRole.EXPERT
CLIENT, ADMIN = PeerRole.CLIENT, PeerRole.ADMIN


@dataclass(frozen=True)
class Secured:
    """Three servers over TLS; `ports` are their addresses, and whose they are."""

    authority: CertificateAuthority
    key: str
    ports: dict[str, tuple[str, PeerRole]]

    @property
    def with_key(self) -> Metadata:
        return (("authorization", f"Bearer {self.key}"),)

    async def methods(self, port: str) -> list[str]:
        own = None if port == "public" else self.authority.issue(ADMIN)
        async with self.channel(port, own) as channel:
            return await all_methods(channel, self.with_key)

    @asynccontextmanager
    async def channel(
        self, port: str, own: Pem | None, server: PeerRole | None = None
    ) -> AsyncIterator[grpc.aio.Channel]:
        address, role = self.ports[port]
        async with channel_to(address, self.authority.credentials(own), server or role) as channel:
            yield channel

    async def answers(
        self, port: str, own: Pem | None, metadata: Metadata = ()
    ) -> dict[str, grpc.StatusCode]:
        """What every method of `port` answers to a caller with these credentials."""
        methods = await self.methods(port)
        async with self.channel(port, own) as channel:
            codes = [await answer_of(channel, path, metadata) for path in methods]
        return dict(zip(methods, codes, strict=True))


@pytest.fixture
async def secured(tmp_path: Path) -> AsyncIterator[Secured]:
    authority, key = CertificateAuthority(), new_key()
    key_file = tmp_path / "keys.yaml"
    key_file.write_text(f"- {{name: somebody, hash: '{hash_of(key)}'}}\n")

    def certificates(role: PeerRole) -> Certificates:
        return Certificates(authority.files(tmp_path / role, role), role)

    attention, expert = GrpcHost(certificates(ATTN)), GrpcHost(certificates(EXPERT))
    attention.add(add_to_server, AttentionServicer(), SERVICE_NAME)
    ExchangeGate().add_to(expert)
    async with AsyncExitStack() as stack:
        gateway = SmallGateway(tls=certificates(GATEWAY), keys=ApiKeys(key_file))
        await stack.enter_async_context(gateway)
        ports = {
            "public": (gateway.address, GATEWAY),
            "cluster": (gateway.cluster_address, GATEWAY),
        }
        for name, host, role in (("attn", attention, ATTN), ("expert", expert, EXPERT)):
            ports[name] = f"127.0.0.1:{await host.start('127.0.0.1', 0)}", role
            stack.push_async_callback(host.stop, 0)
        yield Secured(authority, key, ports)


def not_refused(
    answers: dict[str, grpc.StatusCode], *but: str, codes: Sequence[grpc.StatusCode]
) -> list[str]:
    """Those that should have been, in words; what begins like one of `but` is left out."""
    assert len(answers) > len(but), answers
    return [
        f"{path}: {code.name}"
        for path, code in answers.items()
        if code not in codes and not path.startswith(but)
    ]


WITHOUT_KEY = {
    "no key": (),
    "wrong key": (("authorization", "Bearer epserve-wrong"),),
    "no scheme": (("authorization", "epserve-wrong"),),
    "empty": (("authorization", ""),),
}


@pytest.mark.parametrize("case", WITHOUT_KEY)
async def test_client_without_a_good_key_is_refused_everything_but_health(
    secured: Secured, case: str
) -> None:
    answers = await secured.answers("public", None, WITHOUT_KEY[case])
    assert not_refused(answers, HEALTH, codes=(UNAUTHENTICATED, DENIED)) == []
    answers = await secured.answers("cluster", secured.authority.issue(CLIENT), WITHOUT_KEY[case])
    assert not_refused(answers, HEALTH, codes=(UNAUTHENTICATED, DENIED)) == []


@pytest.mark.parametrize("role", [None, CLIENT])
async def test_key_opens_the_public_service_and_nothing_internal(
    secured: Secured, role: PeerRole | None
) -> None:
    own = None if role is None else secured.authority.issue(role)
    answers = await secured.answers("cluster" if role else "public", own, secured.with_key)
    public = ("/epserve.v1.Gateway/", VLLM, REFLECTION, HEALTH)
    assert not_refused(answers, *public, codes=(DENIED,)) == []
    allowed = {path: code for path, code in answers.items() if path.startswith(public)}
    refusals = (UNAUTHENTICATED, DENIED, NO_CONNECTION)
    assert [path for path, code in allowed.items() if code in refusals] == [
        # UNAVAILABLE: this cluster has no attention process
        "/epserve.v1.Gateway/Generate",
        f"{VLLM}Generate",
    ]


@pytest.mark.parametrize("port", ["cluster", "attn", "expert"])
@pytest.mark.parametrize("case", ["no certificate", "wrong CA", "expired"])
async def test_no_process_talks_to_whom_its_ca_has_not_vouched_for(
    secured: Secured, port: str, case: str
) -> None:
    every = tuple(PeerRole)
    shown = {
        "no certificate": None,
        "wrong CA": CertificateAuthority().issue(*every),
        "expired": secured.authority.issue(*every, lives=timedelta(minutes=-1)),
    }
    answers = await secured.answers(port, shown[case], secured.with_key)
    assert not_refused(answers, codes=(NO_CONNECTION,)) == []


async def test_no_port_answers_in_the_clear(secured: Secured) -> None:
    for port, (address, _) in secured.ports.items():
        methods = await secured.methods(port)
        async with grpc.aio.insecure_channel(address) as channel:
            codes = [await answer_of(channel, path, secured.with_key) for path in methods]
        assert set(codes) == {NO_CONNECTION}, port


@pytest.mark.parametrize(
    ("port", "role", "open_to_it"),
    [
        ("attn", CLIENT, ()),
        ("attn", EXPERT, ()),
        (
            "attn",
            GATEWAY,
            ("/epserve.v1.AttentionService/Serve", "/epserve.v1.AttentionService/Find"),
        ),
        (
            "attn",
            ATTN,
            (
                "/epserve.v1.AttentionService/Follow",
                "/epserve.v1.AttentionService/Handover",
                "/epserve.v1.AttentionService/FetchBlocks",
            ),
        ),
        ("expert", CLIENT, ()),
        ("expert", GATEWAY, ()),
        ("expert", EXPERT, ("/epserve.v1.ExpertService/Handover",)),
        (
            "expert",
            ATTN,
            ("/epserve.v1.ExpertService/Exchange", "/epserve.v1.ExpertService/Locate"),
        ),
        ("cluster", CLIENT, ()),
        ("cluster", ADMIN, ("/epserve.v1.Admin/",)),
        ("cluster", GATEWAY, ("/epserve.v1.ClusterService/",)),
        (
            "cluster",
            ATTN,
            ("/epserve.v1.ClusterService/Register", "/epserve.v1.ClusterService/Lease"),
        ),
        (
            "cluster",
            EXPERT,
            ("/epserve.v1.ClusterService/Register", "/epserve.v1.ClusterService/Lease"),
        ),
    ],
)
async def test_role_opens_what_it_needs_and_nothing_else(
    secured: Secured, port: str, role: PeerRole, open_to_it: tuple[str, ...]
) -> None:
    answers = await secured.answers(port, secured.authority.issue(role))
    refusals = (DENIED, UNAUTHENTICATED)
    assert not_refused(answers, HEALTH, *open_to_it, codes=refusals) == []
    opened = [path for path in answers if path.startswith(open_to_it or ("none",))]
    for path in opened:
        assert path.startswith("/epserve.v1.Admin/") or answers[path] not in refusals


async def test_certificate_without_a_role_opens_health_alone(secured: Secured) -> None:
    for port in ("cluster", "attn", "expert"):
        answers = await secured.answers(port, secured.authority.issue())
        assert not_refused(answers, HEALTH, codes=(DENIED, UNAUTHENTICATED)) == []


@pytest.mark.parametrize("port", ["public", "cluster", "attn", "expert"])
async def test_client_does_not_talk_to_a_server_of_another_role(
    secured: Secured, port: str
) -> None:
    own = secured.authority.issue(*PeerRole)
    role = secured.ports[port][1]
    for other in set(PeerRole) - {role}:
        async with secured.channel(port, own, server=other) as channel:
            code = await answer_of(channel, f"{HEALTH}Check", secured.with_key)
        assert code is NO_CONNECTION


async def test_nobody_speaks_for_a_tier_whose_certificate_it_does_not_have(
    secured: Secured, tmp_path: Path
) -> None:
    own = Certificates(secured.authority.files(tmp_path / "own", EXPERT), EXPERT)
    gateway = secured.ports["cluster"][0]
    as_expert = Join(
        *(Role.EXPERT, "127.0.0.1:1", "cpu", 1),
        *(FINGERPRINT, new_instance_epoch(), "float32", host_id()),
    )
    as_attn = replace(as_expert, role=Role.ATTN)
    with pytest.raises(AccessError, match=r"an attn process .* needs .* epserve://attn"):
        await Membership.join(gateway, as_attn, timeout_s=5, tls=own)
    membership = await Membership.join(gateway, as_expert, timeout_s=5, tls=own)
    async with open_channel(gateway, expecting(own, GATEWAY)) as channel:
        stub: Any = ClusterServiceStub(channel)
        request = LeaseRequest(role=role_to_pb(Role.ATTN), rank=0, instance_epoch=1)
        with pytest.raises(grpc.aio.AioRpcError, match="PERMISSION_DENIED"):
            await stub.Lease(request, timeout=5)
    await membership.close()


async def test_a_request_carries_the_name_of_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, callers = new_key(), []
    path = tmp_path / "keys.yaml"
    path.write_text(f"- {{name: somebody, hash: '{hash_of(key)}'}}\n")

    async def generate(
        request: GenerationRequest, shape: Callable[[Chunk], object]
    ) -> AsyncIterator[list[object]]:
        callers.append(request.caller.name)
        yield [shape(Chunk("", 0, (), "", "stop"))]

    async with SmallGateway(keys=ApiKeys(path)) as gateway:
        monkeypatch.setattr(gateway.generator, "generate_batches", generate)
        shown = (("authorization", f"Bearer {key}"),)
        call = gateway.stub.Generate(GenerateRequest(), metadata=shown, timeout=5)
        assert [answer.finish_reason async for answer in call] == ["stop"]
    assert callers == ["somebody"]


async def test_a_service_without_a_rule_cannot_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {name: rule for name, rule in RULES.items() if name != SERVICE_NAME}
    monkeypatch.setattr("moe_core.service.access.RULES", rules)
    host = GrpcHost()
    host.add(add_to_server, AttentionServicer(), SERVICE_NAME)
    with pytest.raises(LookupError, match=r"AttentionService has no rule"):
        await host.start("127.0.0.1", 0)
