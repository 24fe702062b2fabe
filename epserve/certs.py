"""`epserve certs`: a CA for one cluster, and a certificate of each role that it signs.

Knows X.509 and which files are made. Knows no process; what the names in a certificate mean is
moe_core/service/peer_roles.py's.
"""

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from moe_core.errors import ConfigError
from moe_core.service.peer_roles import PeerRole

CA_DAYS = 3650
CLOCK_SKEW = timedelta(minutes=5)
ON_ONE_MACHINE = (PeerRole.GATEWAY, PeerRole.ATTN, PeerRole.EXPERT)
# By file name: the roles that its certificate shows. Hosts are named where clients connect.
LEAVES: dict[str, tuple[PeerRole, ...]] = {role.value: (role,) for role in PeerRole}
LEAVES["serve"] = ON_ONE_MACHINE


@dataclass(frozen=True, slots=True)
class Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_certificates(directory: Path, days: int, hosts: Sequence[str]) -> list[Path]:
    """The files written: NAME.crt and NAME.key for each of LEAVES, and those of the CA unless
    `directory` has them. `days` is how long the certificates are good, `hosts` are the names and
    addresses by which clients reach the gateway.

    Raises ConfigError, before anything is written, for a file that is there already.
    """
    names = [_host_name(host) for host in hosts]
    taken = [path for name in LEAVES for path in _paths(directory, name) if path.exists()]
    if taken:
        rule = "is there already and is never overwritten; move it away to have a new one"
        raise ConfigError("directory", str(taken[0]), rule)
    directory.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    authority = _existing_authority(directory)
    if authority is None:
        authority = _new_authority(max(days, CA_DAYS))
        written += _write(directory, "ca", authority.certificate, authority.key)
    for name, roles in LEAVES.items():
        certificate, key = _issue(authority, name, roles, names, days)
        written += _write(directory, name, certificate, key)
    return written


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise ConfigError("hosts", host, "must be a host name in ASCII or an address") from None


def _paths(directory: Path, name: str) -> tuple[Path, Path]:
    return directory / f"{name}.crt", directory / f"{name}.key"


def _existing_authority(directory: Path) -> Authority | None:
    certificate_path, key_path = _paths(directory, "ca")
    there = [path for path in (certificate_path, key_path) if path.exists()]
    if not there:
        return None
    if len(there) == 1:
        rule = "is there without the other half of the CA (ca.crt and ca.key)"
        raise ConfigError("directory", str(there[0]), rule)
    try:
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        key = load_pem_private_key(key_path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError("directory", str(directory), f"its CA is unusable: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("directory", str(key_path), "is no elliptic-curve key of epserve certs")
    if key.public_key() != certificate.public_key():
        raise ConfigError("directory", str(key_path), f"is not the key of {certificate_path}")
    return Authority(certificate, key)


def _new_authority(days: int) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder("epserve CA", key, days)
    certificate = (
        builder.issuer_name(_name("epserve CA"))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def _issue(
    authority: Authority,
    name: str,
    roles: Sequence[PeerRole],
    hosts: Sequence[x509.GeneralName],
    days: int,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = []
    for role in roles:
        names += x509.UniformResourceIdentifier(role.uri), x509.DNSName(role.dns_name)
    if PeerRole.GATEWAY in roles:
        names += hosts
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    ca_key = authority.key.public_key()
    certificate = (
        _builder(f"epserve {name}", key, days)
        .issuer_name(authority.certificate.subject)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return certificate, key


def _builder(
    common_name: str, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(common_name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(
    directory: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> tuple[Path, Path]:
    certificate_path, key_path = _paths(directory, name)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    _create(key_path, pem, 0o600)
    _create(certificate_path, certificate.public_bytes(Encoding.PEM), 0o644)
    return certificate_path, key_path


def _create(path: Path, contents: bytes, mode: int) -> None:
    """Never over another file, and never for a moment readable by more than `mode` says."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(contents)
