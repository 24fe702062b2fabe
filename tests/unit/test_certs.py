"""What `epserve certs` writes: certificates that processes take, and nothing over another file."""

from pathlib import Path

import pytest
from cryptography import x509

from epserve import cli
from epserve.certs import LEAVES
from moe_core.errors import ConfigError
from moe_core.service.certificates import Certificates
from moe_core.service.peer_roles import PeerRole
from moe_core.service.tls_files import TlsFiles

FILES = {f"{name}.{kind}" for name in ("ca", *LEAVES) for kind in ("crt", "key")}


def files(directory: Path, name: str) -> TlsFiles:
    return TlsFiles(directory / "ca.crt", directory / f"{name}.crt", directory / f"{name}.key")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    assert cli.run(["certs", str(tmp_path / "tls"), "--hosts", "gw.example.com,10.1.2.3"]) == 0
    return tmp_path / "tls"


def test_each_role_has_a_certificate_that_its_process_takes(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == FILES
    for role in PeerRole:
        Certificates(files(made, role.value), role)
    Certificates(files(made, "serve"), PeerRole.GATEWAY, PeerRole.ATTN, PeerRole.EXPERT)
    with pytest.raises(ConfigError, match="epserve://gateway"):
        Certificates(files(made, "attn"), PeerRole.GATEWAY)


def test_keys_are_their_owners_alone(made: Path) -> None:
    assert {path.stat().st_mode & 0o077 for path in made.glob("*.key")} == {0}


def test_all_are_signed_by_the_ca_and_the_gateway_has_its_hosts(made: Path) -> None:
    ca = x509.load_pem_x509_certificate((made / "ca.crt").read_bytes())
    for name in LEAVES:
        certificate = x509.load_pem_x509_certificate((made / f"{name}.crt").read_bytes())
        certificate.verify_directly_issued_by(ca)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = {"gw.example.com", "localhost"} & set(names.get_values_for_type(x509.DNSName))
        addresses = {str(each) for each in names.get_values_for_type(x509.IPAddress)}
        if name in ("gateway", "serve"):
            assert hosts == {"gw.example.com", "localhost"}
            assert addresses == {"10.1.2.3", "127.0.0.1", "::1"}
        else:
            assert (hosts, addresses) == (set(), set())


def test_nothing_is_overwritten(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made / "admin.key").unlink()
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    assert cli.run(["certs", str(made)]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before


def test_a_ca_that_is_there_signs_the_next_ones(made: Path) -> None:
    ca, old = (made / "ca.crt").read_bytes(), (made / "attn.crt").read_bytes()
    for path in made.iterdir():
        if path.stem != "ca":
            path.unlink()
    assert cli.run(["certs", str(made), "--days", "3"]) == 0
    assert (made / "ca.crt").read_bytes() == ca
    assert (made / "attn.crt").read_bytes() != old
    new = x509.load_pem_x509_certificate((made / "attn.crt").read_bytes())
    new.verify_directly_issued_by(x509.load_pem_x509_certificate(ca))


@pytest.mark.parametrize("half", ["ca.crt", "ca.key"])
def test_half_a_ca_is_refused(
    tmp_path: Path, half: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / half).write_text("half")
    assert cli.run(["certs", str(tmp_path)]) == 2
    assert "other half" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [half]


def test_the_next_command_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["certs", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert f"wrote {tmp_path}/new/ca.crt" in said
    assert "next: epserve serve --model DIR --tls-cert" in said
