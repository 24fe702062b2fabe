"""A file of settings for one command, read from YAML and checked by name.

Knows YAML and which names a command has. A value stays the text that it would be on the command
line, so that both are read and refused by the same rules, and 0123 or 12:34 is not taken for a
number. Nothing is constructed from the file but text and lists of text.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

import yaml

from moe_core.errors import ConfigError

MAX_BYTES = 1 << 20
_NULL = "tag:yaml.org,2002:null"
_SWITCH_WORDS = ("true", "false")

Value = str | list[str]


class Takes(Enum):
    """What the file may say of a setting."""

    TEXT = auto()  # a number counts as text
    LIST = auto()
    SWITCH = auto()  # true or false


@dataclass(frozen=True, slots=True)
class _Entry:
    key: str  # as written
    value: yaml.Node
    line: int  # from 1


class ConfigFile(dict[str, Value]):
    """The settings that a file gives, by option name (dp_size), and where in it each stands."""

    def __init__(self, path: Path, entries: Mapping[str, tuple[Value, int]]) -> None:
        super().__init__({name: value for name, (value, _) in entries.items()})
        self._path = path
        self._lines = {name: line for name, (_, line) in entries.items()}

    def place(self, name: str) -> str:
        """File and line of a setting that the file gives."""
        return f"{self._path}, line {self._lines[name]}"


def read_config_file(path: Path, settings: Mapping[str, Takes], command: str) -> ConfigFile:
    """The settings in `path`; those that are null there are left out.

    Raises ConfigError for a file that cannot be read, is over a MiB or is no YAML mapping, for a
    key that is no setting or stands twice, and for a value of the wrong kind.
    """
    entries: dict[str, tuple[Value, int]] = {}
    seen: dict[str, int] = {}
    for entry in _entries(path):
        name = _setting_name(path, entry, settings, command)
        if name in seen:
            rule = f"line {entry.line}: {entry.key} stands on line {seen[name]} already"
            raise _refusal(path, rule)
        seen[name] = entry.line
        value = _value(path, entry, settings[name])
        if value is not None:
            entries[name] = (value, entry.line)
    return ConfigFile(path, entries)


def key_of(name: str) -> str:
    """How files call the setting: as its long option, without the dashes before it."""
    return name.replace("_", "-")


def shortened(text: str) -> str:
    """A value as an error quotes it."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def _entries(path: Path) -> Iterator[_Entry]:
    try:
        root = yaml.compose(_read(path), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise _refusal(path, f"{line}is no YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise _refusal(path, f"is no YAML: {error}") from None
    except RecursionError:
        raise _refusal(path, "is nested too deeply") from None
    if root is None or root.tag == _NULL:
        return
    if not isinstance(root, yaml.MappingNode):
        raise _refusal(path, f"line {_line(root)}: must be a mapping of settings to values")
    for key, value in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _refusal(path, f"line {_line(key)}: a key must be the name of a setting")
        yield _Entry(key.value, value, _line(key))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _refusal(path, f"cannot be read: {error.strerror or error}") from None
    if len(content) > MAX_BYTES:
        raise _refusal(path, f"must not be larger than {MAX_BYTES} bytes")
    return content


def _setting_name(path: Path, entry: _Entry, settings: Mapping[str, Takes], command: str) -> str:
    name = entry.key.replace("-", "_")
    if name in settings:
        return name
    close = difflib.get_close_matches(name, settings, n=1, cutoff=0.0)
    rule = f"line {entry.line}: {_shown(entry)}: is no setting of {command}"
    raise _refusal(path, rule, [key_of(found) for found in close])


def _value(path: Path, entry: _Entry, takes: Takes) -> Value | None:
    node = entry.value
    if node.tag == _NULL:
        return None
    if takes is Takes.LIST:
        if isinstance(node, yaml.SequenceNode) and all(map(_is_text, node.value)):
            return [item.value for item in node.value]
        raise _wrong_kind(path, entry, "must be a list of values", [f"[{_short(node)}]"])
    if not _is_text(node):
        raise _wrong_kind(path, entry, "must be one value")
    text: str = node.value
    if takes is Takes.SWITCH and text not in _SWITCH_WORDS:
        raise _wrong_kind(path, entry, "must be true or false", _SWITCH_WORDS)
    return text


def _is_text(node: yaml.Node) -> bool:
    """False also for what a tag makes an object of, as !!python/name does."""
    return isinstance(node, yaml.ScalarNode) and node.tag in yaml.SafeLoader.yaml_constructors


def _wrong_kind(
    path: Path, entry: _Entry, rule: str, nearest: Sequence[object] = ()
) -> ConfigError:
    return _refusal(path, f"line {entry.line}: {_shown(entry)}: {rule}", nearest)


def _shown(entry: _Entry) -> str:
    return f"{entry.key}={_short(entry.value)}"


def _short(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return shortened(node.value)
    return "[...]" if isinstance(node, yaml.SequenceNode) else "{...}"


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _refusal(path: Path, rule: str, nearest: Sequence[object] = ()) -> ConfigError:
    return ConfigError("config", str(path), rule, nearest)
