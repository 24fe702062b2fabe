"""What may be given as --registry, and what is said where it cannot be used."""

import sys

import pytest

from gateway.etcd_store import EtcdAddress, EtcdStore, parse_registry
from moe_core.errors import ConfigError, UnavailableError
from moe_core.service.addresses import bound_socket


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("embedded", None),
        ("etcd://127.0.0.1:2379", EtcdAddress(("127.0.0.1:2379",), "default")),
        ("etcd://localhost:1,[::1]:2/mine", EtcdAddress(("localhost:1", "[::1]:2"), "mine")),
    ],
)
def test_registry_is_embedded_or_names_etcd(text: str, found: EtcdAddress | None) -> None:
    assert parse_registry(text, insecure=False) == found


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("redis://h:1", "must be embedded or etcd://"),
        ("etcd://", "must be HOST:PORT"),
        ("etcd://127.0.0.1", "must be HOST:PORT"),
        ("etcd://127.0.0.1:1/a/b", "holds no /"),
        ("etcd://10.1.2.3:2379", "etcd is reached without TLS"),
    ],
)
def test_other_registries_are_refused_naming_what_may_be(text: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        parse_registry(text, insecure=False)


def test_etcd_elsewhere_is_for_who_says_insecure() -> None:
    assert parse_registry("etcd://10.1.2.3:2379", insecure=True) is not None


def test_missing_library_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aetcd", None)
    with pytest.raises(ConfigError, match=r"pip install 'epserve\[etcd\]'"):
        EtcdStore(EtcdAddress(("127.0.0.1:1",)))


async def test_each_address_is_asked_before_the_registry_counts_as_unreachable() -> None:
    with bound_socket("127.0.0.1", 0) as one, bound_socket("127.0.0.1", 0) as other:
        ports = [each.getsockname()[1] for each in (one, other)]
        store = EtcdStore(EtcdAddress(tuple(f"127.0.0.1:{port}" for port in ports)))
        with pytest.raises(UnavailableError, match=r"the registry cannot be reached: .+; .+"):
            await store.read("")
        await store.close()
