"""Which of the lines that a process printed last say why it ended.

Knows the forms in which epserve's processes and the libraries under them log. Knows no process.
"""

import json
import re
from collections.abc import Iterable

_QUIET = {"debug", "info"}
_KEY_VALUE = re.compile(r"timestamp='[^']*' level='(\w+)'")  # moe_core.service.logs
_LIBRARY = re.compile(r"[ID]\d{4} \d\d:\d\d:\d\d|.*\bUCX +(?:INFO|DIAG|DEBUG|TRACE)\b")


def telling(lines: Iterable[str]) -> list[str]:
    """All but those that report what went well."""
    return [line for line in lines if not _reports_what_went_well(line)]


def _reports_what_went_well(line: str) -> bool:
    if line.startswith("{"):
        return _json_level(line) in _QUIET
    found = _KEY_VALUE.match(line)
    return _LIBRARY.match(line) is not None if found is None else found[1] in _QUIET


def _json_level(line: str) -> object:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record.get("level")
