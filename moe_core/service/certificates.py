"""A process's certificate, key and CA as they are in their files now.

Knows PEM files, what makes a set of them usable, and gRPC's credentials. Knows no address.

Files are looked at again for every new connection, so a rotated certificate needs no restart;
connections that are open live on. A set is used only if key and certificate belong together and
neither has expired: what is half replaced, or broken, is logged once and the last good set stays.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from moe_core.errors import ConfigError
from moe_core.service.peer_roles import PeerRole
from moe_core.service.tls_files import TlsFiles

log = structlog.get_logger(__name__)

MAX_PEM_BYTES = 1 << 20
Signature = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class PemSet:
    """File contents that go together; `own` is (key, certificate chain)."""

    ca: bytes
    own: tuple[bytes, bytes] | None = field(repr=False)  # a key is never shown


class Certificates:
    """Belongs to one process; may be asked from any thread."""

    def __init__(self, files: TlsFiles, *roles: PeerRole) -> None:
        """The own certificate must carry all of `roles`. Raises ConfigError naming the file."""
        self._files = files
        self._roles = frozenset(roles)
        self._lock = threading.Lock()
        self._complaint = ""
        self._signature: Signature = self._look()
        self._current = self._read()

    @classmethod
    def of(cls, files: TlsFiles | None, *roles: PeerRole) -> "Certificates | None":
        """None where TLS is off."""
        return None if files is None else cls(files, *roles)

    def current(self) -> PemSet:
        """The newest good set."""
        with self._lock:
            try:
                signature = self._look()
                if signature != self._signature:
                    self._signature = signature
                    self._current = self._read()
                    self._complaint = ""
                    log.info("certificates reloaded", ca=str(self._files.ca))
            except ConfigError as error:
                self._complain(str(error))
            return self._current

    @property
    def own_files(self) -> tuple[Path, Path]:
        """The certificate's and the key's, for who can only read files."""
        files = self._files
        assert files.cert is not None and files.key is not None, "a server has its own"  # noqa: PT018
        return files.cert, files.key

    def _complain(self, reason: str) -> None:
        if reason != self._complaint:
            self._complaint = reason
            log.error("certificates are not reloaded, the old ones stay", reason=reason)

    def server_credentials(self, *, ask_clients: bool) -> grpc.ServerCredentials:
        """For one port. gRPC can require a client's certificate or not ask for one; that it asks
        and does without cannot be had from Python."""
        fetch: Any = _Fetch(self.current)  # may return None, which grpc's types do not know
        configuration = _configuration(self.current())
        return grpc.dynamic_ssl_server_credentials(configuration, fetch, ask_clients)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a channel that is opened now."""
        pem = self.current()
        return grpc.ssl_channel_credentials(pem.ca, *(pem.own or (None, None)))

    def _look(self) -> Signature:
        return tuple(_identity(setting, path) for setting, path in self._paths())

    def _paths(self) -> list[tuple[str, Path]]:
        files = self._files
        paths = ("tls_ca", files.ca), ("tls_cert", files.cert), ("tls_key", files.key)
        return [(setting, path) for setting, path in paths if path is not None]

    def _read(self) -> PemSet:
        files = self._files
        ca = _contents("tls_ca", files.ca)
        _parse_certificate("tls_ca", files.ca, ca)
        if files.cert is None or files.key is None:
            return PemSet(ca, None)
        chain, key = _contents("tls_cert", files.cert), _contents("tls_key", files.key)
        certificate = _parse_certificate("tls_cert", files.cert, chain)
        _check_key(files.key, key, certificate)
        _check_roles(files.cert, certificate, self._roles)
        return PemSet(ca, (key, chain))


@dataclass(frozen=True, slots=True)
class ServerCheck:
    """How a channel is secured: what this end shows, and the role that the server must have."""

    certificates: Certificates
    role: PeerRole


def expecting(certificates: Certificates | None, role: PeerRole) -> ServerCheck | None:
    """None where TLS is off."""
    return None if certificates is None else ServerCheck(certificates, role)


class _Fetch:
    """What gRPC asks at every handshake of one port: a new configuration, or None if there is
    nothing new."""

    def __init__(self, current: Callable[[], PemSet]) -> None:
        self._current = current
        self._given = current()

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        pem = self._current()
        if pem == self._given:
            return None
        self._given = pem
        return _configuration(pem)


def _configuration(pem: PemSet) -> grpc.ServerCertificateConfiguration:
    assert pem.own is not None, "a server has a certificate of its own"
    return grpc.ssl_server_certificate_configuration([pem.own], pem.ca)


def _identity(setting: str, path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise ConfigError(setting, str(path), f"cannot be read: {error.strerror}") from None
    if stat.st_size > MAX_PEM_BYTES:
        rule = f"{stat.st_size} bytes; a PEM file has at most {MAX_PEM_BYTES}"
        raise ConfigError(setting, str(path), rule)
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _contents(setting: str, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_PEM_BYTES)
    except OSError as error:
        raise ConfigError(setting, str(path), f"cannot be read: {error.strerror}") from None


def _parse_certificate(setting: str, path: Path, pem: bytes) -> x509.Certificate:
    """The first certificate of `pem`, which is one's own where it is a chain."""
    try:
        certificate = x509.load_pem_x509_certificates(pem)[0]
    except (ValueError, IndexError):
        raise ConfigError(setting, str(path), "holds no PEM certificate") from None
    if certificate.not_valid_after_utc < datetime.now(UTC):
        rule = f"has expired at {certificate.not_valid_after_utc.isoformat()}"
        raise ConfigError(setting, str(path), rule)
    return certificate


def _check_key(path: Path, pem: bytes, certificate: x509.Certificate) -> None:
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        rule = "holds no PEM private key without a passphrase"
        raise ConfigError("tls_key", str(path), rule) from None
    if key.public_key() != certificate.public_key():
        raise ConfigError("tls_key", str(path), "is not the key of the certificate in --tls-cert")


def _check_roles(path: Path, certificate: x509.Certificate, roles: frozenset[PeerRole]) -> None:
    """Both names of a role, or its peers would refuse it later, one by one."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    hosts = names.get_values_for_type(x509.DNSName)
    missing = sorted(role for role in roles if role.uri not in uris or role.dns_name not in hosts)
    if missing:
        wanted = ", ".join(f"{role.uri} with {role.dns_name}" for role in missing)
        rule = f"its subject alternative names lack {wanted}, which this process's peers check"
        raise ConfigError("tls_cert", str(path), rule)
