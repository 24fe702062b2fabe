"""Certificates for tests, good ones and those that must be refused.

Knows X.509; what `epserve certs` makes is tests/unit/test_certs.py's. Made with cryptography
because trustme issues no certificate with a URI in it.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from moe_core.service.peer_roles import PeerRole
from moe_core.service.tls_files import TlsFiles

HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class Pem:
    certificate: bytes
    key: bytes


class CertificateAuthority:
    """Every one has the same name, as those of two clusters of one owner may."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        basic = x509.BasicConstraints(ca=True, path_length=0)
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
        builder = _builder(self._name, self._name, self._key, HOUR)
        builder = builder.add_extension(basic, critical=True)
        self._certificate = builder.sign(self._key, hashes.SHA256())
        self.pem = self._certificate.public_bytes(Encoding.PEM)

    def issue(self, *roles: PeerRole, lives: timedelta = HOUR) -> Pem:
        """A certificate of `roles`; a negative `lives` has passed."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = []
        for role in roles:
            names += x509.UniformResourceIdentifier(role.uri), x509.DNSName(role.dns_name)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
        builder = _builder(name, self._name, key, lives)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Pem(certificate.public_bytes(Encoding.PEM), pem)

    def files(self, directory: Path, *roles: PeerRole) -> TlsFiles:
        """The same in files, as a process has them."""
        return write_files(directory, self.pem, self.issue(*roles))

    def credentials(self, own: Pem | None) -> grpc.ChannelCredentials:
        """Of a client that believes this CA and shows `own`, whatever that is."""
        pair = (None, None) if own is None else (own.key, own.certificate)
        return grpc.ssl_channel_credentials(self.pem, *pair)


def write_files(directory: Path, ca: bytes, own: Pem) -> TlsFiles:
    directory.mkdir(exist_ok=True)
    files = TlsFiles(directory / "ca.crt", directory / "own.crt", directory / "own.key")
    for path, contents in zip(
        (files.ca, files.cert, files.key), (ca, own.certificate, own.key), strict=True
    ):
        assert path is not None
        draft = path.with_suffix(".new")
        draft.write_bytes(contents)
        draft.replace(path)
    return files


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, lives: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 24 * HOUR)
        .not_valid_after(now + lives)
    )
