"""Adding a key to a key file that the gateway may be reading.

Knows the file's two forms, YAML and JSON. What an entry means is gateway/api_keys.py's.
"""

import json
import os
from pathlib import Path

import yaml

from gateway.api_keys import hash_of, parse_keys

PRIVATE = 0o600


def entry_text(name: str, key: str, *, admin: bool = False) -> str:
    """The YAML entry to paste."""
    dumped: str = yaml.safe_dump([_entry(name, key, admin)], sort_keys=False)
    return dumped


def check_entry(name: str, key: str) -> None:
    """Raises ConfigError for a name that no key may have."""
    parse_keys(Path("the new entry"), entry_text(name, key))


def append_entry(path: Path, name: str, key: str, *, admin: bool = False) -> None:
    """Add an entry to the file, which is made if it is not there; comments stay. The file is
    replaced in one step, so that no reader sees half of it. Raises ConfigError, with the file as
    it was, where the result would be none."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if old.lstrip().startswith("["):
        parse_keys(path, old)
        entries = yaml.safe_load(old)
        entries.append(_entry(name, key, admin))
        new = json.dumps(entries, indent=2) + "\n"
    else:
        new = (
            old
            + ("\n" if old and not old.endswith("\n") else "")
            + entry_text(name, key, admin=admin)
        )
    parse_keys(path, new)
    mode = path.stat().st_mode & 0o777 if path.exists() else PRIVATE
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(new)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _entry(name: str, key: str, admin: bool) -> dict[str, object]:
    entry: dict[str, object] = {"name": name, "hash": hash_of(key)}
    return entry | {"admin": True} if admin else entry
