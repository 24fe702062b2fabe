"""Whose key a request shows, and what becomes of a key file that changes."""

import json
from pathlib import Path

import pytest
import yaml

from epserve import cli
from gateway import api_keys
from gateway.api_keys import KEY_BYTES, KEY_PREFIX, ApiKeys, hash_of, new_key, read_keys
from gateway.callers import ANONYMOUS, Caller
from moe_core.errors import AuthenticationError, ConfigError

KEY = KEY_PREFIX + "k" * KEY_BYTES  # one that is the same in every test process
HASH = hash_of(KEY)


def write(path: Path, *entries: dict[str, object]) -> None:
    path.write_text(yaml.safe_dump(list(entries)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "keys.yaml", {"name": "somebody", "hash": HASH})
    return tmp_path / "keys.yaml"


@pytest.fixture(autouse=True)
def _reread_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "RECHECK_S", -1.0)


def test_without_a_file_everybody_is_anonymous() -> None:
    assert ApiKeys(None).authenticate(None) is ANONYMOUS
    assert ApiKeys(None).authenticate("Bearer whatever") is ANONYMOUS


def test_key_names_its_caller_and_limits(path: Path) -> None:
    limits = {"weight": 2, "max_concurrent_requests": 3, "max_tokens_per_minute": 400}
    write(path, {"name": "other", "hash": hash_of("x")}, {"name": "me", "hash": HASH, **limits})
    caller = ApiKeys(path).authenticate(f"Bearer {KEY}")
    assert caller == Caller("me", 2.0, 3, 400)
    assert ApiKeys(path).authenticate(f"bearer  {KEY} ") == caller


def test_the_file_may_be_json(path: Path) -> None:
    path.write_text(json.dumps([{"name": "me", "hash": HASH}]))
    assert ApiKeys(path).authenticate(f"Bearer {KEY}").name == "me"


@pytest.mark.parametrize(
    "shown", [None, "", "Bearer", "Bearer ", KEY, f"Basic {KEY}", "Bearer wrong", f"Bearer {HASH}"]
)
def test_whatever_is_no_key_is_refused_with_the_same_words(path: Path, shown: str | None) -> None:
    with pytest.raises(AuthenticationError) as caught:
        ApiKeys(path).authenticate(shown)
    assert str(caught.value) == api_keys.REFUSAL
    assert caught.value.code == "UNAUTHENTICATED"


def test_a_changed_file_counts_without_a_restart(path: Path) -> None:
    keys, other = ApiKeys(path), new_key()
    write(path, {"name": "another", "hash": hash_of(other)})
    assert keys.authenticate(f"Bearer {other}").name == "another"
    with pytest.raises(AuthenticationError):
        keys.authenticate(f"Bearer {KEY}")


def test_the_file_is_looked_at_once_a_second_at_most(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_keys, "RECHECK_S", 3600.0)
    keys = ApiKeys(path)
    write(path)
    assert keys.authenticate(f"Bearer {KEY}").name == "somebody"


def test_a_broken_file_leaves_the_old_keys(path: Path) -> None:
    keys = ApiKeys(path)
    for spoil in (lambda: path.write_text("- name: ["), path.unlink):
        spoil()
        assert keys.authenticate(f"Bearer {KEY}").name == "somebody"
    write(path)
    with pytest.raises(AuthenticationError):
        keys.authenticate(f"Bearer {KEY}")


def test_an_empty_file_lets_nobody_in(path: Path) -> None:
    path.write_text("")
    with pytest.raises(AuthenticationError):
        ApiKeys(path).authenticate(f"Bearer {KEY}")


def test_the_launcher_has_a_key_that_is_in_no_file(path: Path) -> None:
    own = new_key()
    keys = ApiKeys(path, launcher_key_hash=hash_of(own))
    assert keys.authenticate(f"Bearer {own}").name == "launcher"


@pytest.mark.parametrize(
    ("entries", "rule"),
    [
        ("{}", "must be a list"),
        ("[1]", "entry 1 must be a mapping"),
        (f"[{{hash: '{HASH}'}}]", "name must be"),
        (f"[{{name: '', hash: '{HASH}'}}]", "name must be"),
        (f"[{{name: anonymous, hash: '{HASH}'}}]", "for callers without a key"),
        (f"[{{name: a, hash: {KEY}}}]", r"entry 1 \(a\): hash must be"),
        (f"[{{name: a, hash: '{HASH}', root: 1}}]", "unknown field 'root'"),
        (f"[{{name: a, hash: '{HASH}', admin: 1}}]", "admin=1 must be true or false"),
        (f"[{{name: a, hash: '{HASH}', weight: 0}}]", "weight=0"),
        (f"[{{name: a, hash: '{HASH}', weight: .nan}}]", "weight=nan"),
        (f"[{{name: a, hash: '{HASH}', max_concurrent_requests: 0}}]", "max_concurrent_requests=0"),
        (f"[{{name: a, hash: '{HASH}', max_tokens_per_minute: x}}]", "max_tokens_per_minute='x'"),
        (f"[{{name: a, hash: '{HASH}'}}, {{name: b, hash: '{HASH}'}}]", "hash .* twice"),
        (f"[{{name: a, hash: '{HASH}'}}, {{name: a, hash: '{hash_of('x')}'}}]", "'a' .* twice"),
        ("[" * 5000, "is no YAML"),
    ],
)
def test_entry_that_cannot_be_is_refused_by_name(path: Path, entries: str, rule: str) -> None:
    path.write_text(entries)
    with pytest.raises(ConfigError, match=rule) as caught:
        ApiKeys(path)
    assert KEY not in str(caught.value)


def test_missing_and_huge_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        ApiKeys(tmp_path / "gone")
    huge = tmp_path / "huge"
    huge.write_bytes(b" " * (api_keys.MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="at most 1048576"):
        ApiKeys(huge)


def test_keys_new_prints_a_key_and_the_entry_that_lets_it_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["keys", "new", "somebody"]) == 0
    said = capsys.readouterr()
    path = tmp_path / "keys.yaml"
    path.write_text(said.err.partition("\n")[2])
    assert ApiKeys(path).authenticate(f"Bearer {said.out.strip()}").name == "somebody"
    assert said.out.strip() not in said.err


def test_only_keys_made_for_it_are_an_administrators(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    assert cli.run(["keys", "new", "operator", "--admin", "--file", str(path)]) == 0
    assert cli.run(["keys", "new", "somebody", "--file", str(path)]) == 0
    assert {key.caller.name: key.caller.admin for key in read_keys(path)} == {
        "operator": True,
        "somebody": False,
    }


@pytest.mark.parametrize("old", [None, "# ours\n- {name: old, hash: 'HASH'}", "[]", ""])
def test_keys_new_adds_to_a_file_and_keeps_what_is_there(
    tmp_path: Path, old: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys"
    if old is not None:
        path.write_text(old.replace("HASH", HASH))
    for name in ("one", "two"):
        assert cli.run(["keys", "new", name, "--file", str(path)]) == 0
    names = [key.caller.name for key in read_keys(path)]
    assert names == (["old"] if old and "old" in old else []) + ["one", "two"]
    assert "# ours" in path.read_text() or not old or "ours" not in old
    if old is None:
        assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_text()
    assert cli.run(["keys", "new", "one", "--file", str(path)]) == 2
    assert "twice" in capsys.readouterr().err
    assert path.read_text() == before
    assert [each.name for each in tmp_path.iterdir()] == ["keys"]
