"""Which files of settings are read, and which are refused before anything follows from them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epserve.config_file import MAX_BYTES, ConfigFile, Takes, read_config_file
from moe_core.errors import ConfigError
from support.patience import patient

SETTINGS = {"dp_size": Takes.TEXT, "stop": Takes.LIST, "colocated": Takes.SWITCH}


def read(path: Path, content: str | bytes) -> ConfigFile:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_config_file(path, SETTINGS, "serve")


@pytest.mark.parametrize("text", ["0123", "12:34", "1e3", "yes", "2026-01-01", "2GiB", "'null'"])
def test_a_value_is_the_text_that_the_command_line_would_hold(text: str, tmp_path: Path):
    assert read(tmp_path / "c", f"dp-size: {text}") == {"dp_size": text.strip("'")}


@pytest.mark.parametrize("key", ["dp-size", "dp_size"])
def test_keys_have_dashes_or_underscores(key: str, tmp_path: Path):
    assert read(tmp_path / "c", f"{key}: 2") == {"dp_size": "2"}


def test_lists_and_switches(tmp_path: Path):
    settings = read(tmp_path / "c", "stop: [a, 1]\ncolocated: true\n")
    assert settings == {"stop": ["a", "1"], "colocated": "true"}
    assert settings.place("colocated") == f"{tmp_path / 'c'}, line 2"


@pytest.mark.parametrize("content", ["", "# nothing\n", "null", "dp-size: null\nstop:\n"])
def test_null_is_not_set(content: str, tmp_path: Path):
    assert read(tmp_path / "c", content) == {}


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("dp-size: [", "line 1: is no YAML"),
        ("dp-size: 1\n\tstop: 2", "line 2: is no YAML"),
        ("- dp-size", "line 1: must be a mapping"),
        ("dp-size", "line 1: must be a mapping"),
        ("? [a]\n: 1", "line 1: a key must be"),
        ("a: 1\n---\nb: 2", "is no YAML"),
        (b"dp-size: \xff", "is no YAML"),
        (b"dp-size: \0", "is no YAML"),
        ("[" * 5_000, "nested too deeply"),
        ("dp_size: 1\ndp-size: 2", "line 2: dp-size stands on line 1 already"),
        ("dp-size: 1\ndp-size: null", "line 2: dp-size stands on line 1 already"),
        ("dpsize: 1", "line 1: dpsize=1: is no setting of serve; nearest valid: dp-size"),
        ("<<: {dp-size: 1}", "<<={...}: is no setting"),
        ("dp-size: {a: 1}", "must be one value"),
        ("dp-size: !!python/name:os.system", "must be one value"),
        ("dp-size: !!python/object/apply:os.system [true]", "must be one value"),
        ("dp-size: !mine 1", "must be one value"),
        ("stop: x", "stop=x: must be a list of values; nearest valid: [x]"),
        ("stop: [[x]]", "must be a list of values"),
        ("colocated: yes", "colocated=yes: must be true or false; nearest valid: true, false"),
        ("colocated: ''", "colocated=: must be true or false"),
        (f"dpsize: {'x' * 5000}", f"dpsize={'x' * 57}...: is no setting"),
    ],
)
def test_a_file_that_is_refused_is_named_with_the_rule(
    content: str | bytes, rule: str, tmp_path: Path
):
    with pytest.raises(ConfigError) as refused:
        read(tmp_path / "c", content)
    assert str(refused.value).startswith(f"config='{tmp_path / 'c'}': ")
    assert rule in str(refused.value)


def test_a_directory_or_nothing_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_config_file(tmp_path, SETTINGS, "serve")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_config_file(tmp_path / "none", SETTINGS, "serve")


def test_a_file_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def forbidden(_path: Path, _mode: str) -> None:  # root may read any file, so none will do
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        read_config_file(tmp_path / "c", SETTINGS, "serve")


def test_a_file_of_more_than_a_mebibyte_is_refused(tmp_path: Path):
    line = "dp-size: 2\n"
    assert read(tmp_path / "c", line + "#" * (MAX_BYTES - len(line))) == {"dp_size": "2"}
    with pytest.raises(ConfigError, match="must not be larger than 1048576 bytes"):
        read(tmp_path / "c", line + "#" * (MAX_BYTES - len(line) + 1))
    with pytest.raises(ConfigError, match="must not be larger"):
        read_config_file(Path("/dev/zero"), SETTINGS, "serve")


yaml_like = st.text(
    alphabet=st.sampled_from("dp-sizeto:[]{}!&*<>|'\"#%@`?,~ \n\t0é\0"), max_size=60
)


@patient
@given(content=st.binary(max_size=60) | yaml_like)
def test_any_content_is_read_or_refused(
    content: str | bytes, tmp_path_factory: pytest.TempPathFactory
):
    try:
        settings = read(tmp_path_factory.getbasetemp() / "any", content)
    except ConfigError:
        return
    assert settings.keys() <= SETTINGS.keys()
