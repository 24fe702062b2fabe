"""Who may change the cluster: an administrator by certificate or by key, and nobody else.

In the clear and without keys everybody may: such a gateway listens on this machine only.
"""

from pathlib import Path

import grpc
import grpc.aio
import pytest

from gateway.api_keys import ApiKeys, hash_of, new_key
from moe_core.service.certificates import Certificates
from moe_core.service.peer_roles import PeerRole
from support.certificates import CertificateAuthority
from support.every_method import Metadata, all_methods, answer_of, channel_to
from support.small_gateway import SmallGateway

DENIED, UNAUTHENTICATED = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED
ADMIN = "/epserve.v1.Admin/"
OURS, THEIRS = new_key(), new_key()
WITH_ADMIN_KEY: Metadata = (("authorization", f"Bearer {OURS}"),)
WITH_OTHER_KEY: Metadata = (("authorization", f"Bearer {THEIRS}"),)


@pytest.fixture
def keys(tmp_path: Path) -> ApiKeys:
    path = tmp_path / "keys.yaml"
    path.write_text(
        f"- {{name: operator, hash: '{hash_of(OURS)}', admin: true}}\n"
        f"- {{name: somebody, hash: '{hash_of(THEIRS)}'}}\n"
    )
    return ApiKeys(path)


async def answers(channel: grpc.aio.Channel, metadata: Metadata) -> set[grpc.StatusCode]:
    """What the methods of Admin answer to a caller with these metadata."""
    methods = [m for m in await all_methods(channel, WITH_ADMIN_KEY) if m.startswith(ADMIN)]
    assert len(methods) >= 3
    return {await answer_of(channel, path, metadata) for path in methods}


async def test_without_tls_only_an_administrators_key_changes_the_cluster(keys: ApiKeys) -> None:
    async with SmallGateway(keys=keys) as gateway:
        assert await answers(gateway.channel, WITH_OTHER_KEY) == {DENIED}
        assert await answers(gateway.channel, ()) == {UNAUTHENTICATED}
        assert not await answers(gateway.channel, WITH_ADMIN_KEY) & {DENIED, UNAUTHENTICATED}


async def test_without_tls_and_keys_everybody_may() -> None:
    async with SmallGateway() as gateway:
        assert not await answers(gateway.channel, ()) & {DENIED, UNAUTHENTICATED}


@pytest.mark.parametrize("with_keys", [True, False])
async def test_over_tls_a_certificate_or_a_key_of_an_administrator_is_needed(
    tmp_path: Path, keys: ApiKeys, with_keys: bool
) -> None:
    authority = CertificateAuthority()
    tls = Certificates(authority.files(tmp_path / "gateway", PeerRole.GATEWAY), PeerRole.GATEWAY)

    async with SmallGateway(tls=tls, keys=keys if with_keys else None) as gateway:

        async def shown(address: str, role: PeerRole | None, metadata: Metadata) -> bool:
            """Whether a caller with these is let in."""
            own = None if role is None else authority.issue(role)
            credentials = authority.credentials(own)
            async with channel_to(address, credentials, PeerRole.GATEWAY) as channel:
                return not await answers(channel, metadata) & {DENIED, UNAUTHENTICATED}

        public, cluster = gateway.address, gateway.cluster_address
        assert await shown(cluster, PeerRole.ADMIN, WITH_ADMIN_KEY)
        assert await shown(cluster, PeerRole.ADMIN, ())
        assert not await shown(cluster, PeerRole.CLIENT, WITH_OTHER_KEY)
        assert not await shown(cluster, PeerRole.ATTN, ())
        assert not await shown(public, None, WITH_OTHER_KEY)
        assert not await shown(public, None, ())
        assert await shown(public, None, WITH_ADMIN_KEY) == with_keys
