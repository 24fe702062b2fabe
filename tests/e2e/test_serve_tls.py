"""A cluster over TLS whose clients need keys, from the commands that make both to its answers."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from support.processes import epserve, serving

LAYOUT = (
    *("--attn-devices", "2", "--expert-devices", "2", "--ep-size", "2"),
    *("--transport", "nixl", "--dtype", "float64", "--kv-cache-tokens", "256"),
)


@dataclass(frozen=True)
class Secured:
    target: str
    tls: Path
    key: str
    key_file: Path

    def generate(self, *options: str) -> CompletedProcess[str]:
        prompt = ("--prompt-ids", "5,6,7", "--max-tokens", "4", "--temperature", "0", "--json")
        return epserve("generate", "--target", self.target, *prompt, *options)

    @property
    def believes(self) -> tuple[str, str]:
        return "--tls-ca", str(self.tls / "ca.crt")


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    directory = tmp_path_factory.mktemp("secured")
    tls, key_file = directory / "tls", directory / "keys.yaml"
    assert epserve("certs", str(tls)).returncode == 0
    made = epserve("keys", "new", "tester", "--file", str(key_file))
    options = (
        *("--tls-cert", str(tls / "serve.crt"), "--tls-key", str(tls / "serve.key")),
        *("--tls-ca", str(tls / "ca.crt"), "--cluster-port", "0", "--api-keys", str(key_file)),
    )
    with serving(*LAYOUT, *options) as (_, target):
        yield Secured(target, tls, made.stdout.strip(), key_file)


def test_a_key_over_tls_generates(secured: Secured) -> None:
    done = secured.generate(*secured.believes, "--api-key", secured.key)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 4


@pytest.mark.parametrize("options", [(), ("--api-key", "epserve-wrong")])
def test_without_a_good_key_nothing_is_generated(
    secured: Secured, options: tuple[str, ...]
) -> None:
    done = secured.generate(*secured.believes, *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert "needs a valid API key" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_client_that_cannot_know_the_gateway_sends_it_nothing(
    secured: Secured, tmp_path: Path
) -> None:
    epserve("certs", str(tmp_path / "other"))
    for options in ((), ("--tls-ca", str(tmp_path / "other" / "ca.crt"))):
        done = secured.generate(*options, "--api-key", secured.key)
        assert (done.returncode, done.stdout) == (1, "")


def test_all_processes_work_together_and_status_shows_them(secured: Secured) -> None:
    secured.generate(*secured.believes, "--api-key", secured.key)
    options = ("--target", secured.target, *secured.believes, "--api-key", secured.key)
    status = json.loads(epserve("status", *options, "--json").stdout)
    assert {member["state"] for member in status["members"]} == {"ready"}
    assert {link["transport"] for link in status["links"]} == {"nixl"}
    assert len(status["links"]) == 4
