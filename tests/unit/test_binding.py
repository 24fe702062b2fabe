"""Which addresses and ports may be listened on, and how TLS files come together."""

from collections.abc import Callable
from pathlib import Path

import pytest

from attn_service.settings import AttnSettings
from epserve.cluster_settings import ClusterSettings
from expert_service.process import ExpertSettings
from gateway.settings import GatewaySettings
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ConfigError
from moe_core.service.binding import is_loopback, require_safe_bind
from moe_core.service.tls_files import TlsFiles

HERE, MODEL = "127.0.0.1:1", Path("model")
FILES = TlsFiles(Path("ca"), Path("cert"), Path("key"))


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.9.10", "::1", "[::1]", "localhost", "LOCALHOST"]
)
def test_loopback_needs_nothing(host: str) -> None:
    assert is_loopback(host)
    require_safe_bind("host", host, None, False)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "10.1.2.3", "fe80::1", "node3", "localhost.example.com", "127.1"]
)
def test_anything_else_needs_tls_or_a_word(host: str) -> None:
    with pytest.raises(ConfigError, match=r"http_host=.*epserve certs DIR.*--insecure"):
        require_safe_bind("http_host", host, None, False)
    require_safe_bind("http_host", host, None, True)
    require_safe_bind("http_host", host, FILES, False)


def _gateway(host: str, tls: TlsFiles | None, insecure: bool) -> object:
    return GatewaySettings(MODEL, host, 0, ParallelConfig(), tls=tls, insecure=insecure)


def _attn(host: str, tls: TlsFiles | None, insecure: bool) -> object:
    return AttnSettings(HERE, MODEL, host, tls=tls, insecure=insecure)


def _expert(host: str, tls: TlsFiles | None, insecure: bool) -> object:
    return ExpertSettings(HERE, MODEL, host, tls=tls, insecure=insecure)


def _serve(host: str, tls: TlsFiles | None, insecure: bool) -> object:
    return ClusterSettings(MODEL, host=host, tls=tls, insecure=insecure)


@pytest.mark.parametrize("make", [_gateway, _attn, _expert, _serve])
def test_every_process_refuses_an_open_bind(
    make: Callable[[str, TlsFiles | None, bool], object],
) -> None:
    with pytest.raises(ConfigError, match=r"host='0\.0\.0\.0'.*--insecure"):
        make("0.0.0.0", None, False)
    make("0.0.0.0", None, True)
    make("0.0.0.0", FILES, False)
    make("127.0.0.1", None, False)


def test_a_process_takes_three_tls_files_or_none() -> None:
    path = Path("x")
    assert TlsFiles.of_process(None, None, None) is None
    assert TlsFiles.of_process(path, path, path) == TlsFiles(path, path, path)
    for given in ((path, None, None), (None, path, path), (path, path, None)):
        with pytest.raises(ConfigError, match=r"--tls-cert, --tls-key and --tls-ca, or none"):
            TlsFiles.of_process(*given)


def test_a_client_takes_a_ca_and_perhaps_a_pair() -> None:
    path = Path("x")
    assert TlsFiles.of_client(None, None, None) is None
    assert TlsFiles.of_client(path, None, None) == TlsFiles(path)
    for given in ((path, path, None), (path, None, path), (None, path, path)):
        with pytest.raises(ConfigError, match="tls"):
            TlsFiles.of_client(*given)


def _gateway_ports(http: int, grpc: int, cluster: int, tls: TlsFiles | None) -> object:
    return GatewaySettings(
        MODEL, "127.0.0.1", grpc, ParallelConfig(), http_port=http, cluster_port=cluster, tls=tls
    )


def _serve_ports(http: int, grpc: int, cluster: int, tls: TlsFiles | None) -> object:
    return ClusterSettings(MODEL, http_port=http, grpc_port=grpc, cluster_port=cluster, tls=tls)


@pytest.mark.parametrize("make", [_gateway_ports, _serve_ports])
def test_two_settings_cannot_name_one_port(
    make: Callable[[int, int, int, TlsFiles | None], object],
) -> None:
    words = r"^grpc_port=7001: port is 7001 as well, and each needs a port of its own"
    with pytest.raises(ConfigError, match=words):
        make(7001, 7001, 0, None)
    with pytest.raises(ConfigError, match=r"^cluster_port=7001: grpc_port is 7001 as well"):
        make(0, 7001, 7001, FILES)
    make(0, 7001, 7001, None)  # the cluster's port is not used
    make(0, 0, 0, FILES)
