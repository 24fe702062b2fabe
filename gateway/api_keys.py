"""Who may use the gateway: keys, each with a caller's name and limits, from a file that is reread.

Knows the key file's form and what a key looks like. Knows no transport: gRPC and HTTP hand over
the same `authorization` header. Enforces no limit: whoever schedules requests does.

The file holds digests, not keys. A plain sha256 is right for them: a key is 32 random bytes, so
nobody finds it by trying, which is what the slow, salted digests of passwords are for; and one is
computed for every request.
"""

import hashlib
import hmac
import secrets
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import yaml

from gateway.callers import ANONYMOUS, Caller
from moe_core.errors import AuthenticationError, ConfigError

log = structlog.get_logger(__name__)

KEY_PREFIX = "epserve-"
KEY_BYTES = 32
HASH_PREFIX = "sha256:"
MAX_FILE_BYTES = 1 << 20
MAX_NAME = 64
RECHECK_S = 1.0
FIELDS = ("name", "hash", "weight", "max_concurrent_requests", "max_tokens_per_minute", "admin")
REFUSAL = "needs a valid API key: authorization: Bearer KEY"


def new_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_of(key: str) -> str:
    """What the key file holds of `key`."""
    return HASH_PREFIX + hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One entry of a key file."""

    hash: str
    caller: Caller


class ApiKeys:
    """The keys that are good now. Without a file everybody is ANONYMOUS."""

    def __init__(self, path: Path | None, *, launcher_key_hash: str | None = None) -> None:
        """`launcher_key_hash`: of the key of whoever started this process and watches it. Raises
        ConfigError naming file, entry, field and rule."""
        self._path = path
        self._launcher: tuple[ApiKey, ...] = ()
        if launcher_key_hash is not None:
            self._launcher = (ApiKey(launcher_key_hash, Caller("launcher")),)
        self._keys: tuple[ApiKey, ...] = ()
        self._seen: tuple[int, int, int] | None = None
        self._complaint = ""
        self._look_again_at = time.monotonic() + RECHECK_S
        if path is not None:
            self._seen = _identity(path)
            self._keys = read_keys(path)

    def authenticate(self, authorization: str | None) -> Caller:
        """Whose key it is that `authorization` ("Bearer KEY") holds. Raises AuthenticationError
        with the same words for a header that is missing, malformed or of nobody."""
        if self._path is None:
            return ANONYMOUS
        self._reread_if_due(self._path)
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError(REFUSAL)
        wanted = hash_of(key.strip())
        # All are compared, so that the time taken does not tell which entry was found.
        found = [
            each
            for each in (*self._keys, *self._launcher)
            if hmac.compare_digest(each.hash, wanted)
        ]
        if not found:
            raise AuthenticationError(REFUSAL)
        return found[0].caller

    def _reread_if_due(self, path: Path) -> None:
        now = time.monotonic()
        if now < self._look_again_at:
            return
        self._look_again_at = now + RECHECK_S
        try:
            identity = _identity(path)
            if identity == self._seen:
                return
            self._seen = identity
            self._keys = read_keys(path)
            self._complaint = ""
            log.info("API keys reloaded", path=str(path), keys=len(self._keys))
        except ConfigError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.error("API keys are not reloaded, the old ones stay", reason=str(error))


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The entries of a YAML or JSON file. Raises ConfigError."""
    return parse_keys(path, _text(path))


def parse_keys(path: Path, text: str) -> tuple[ApiKey, ...]:
    """The entries of `text`, which errors call `path`. Raises ConfigError."""
    try:
        entries = yaml.safe_load(text)  # JSON is YAML
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _refused(path, f"is no YAML or JSON: {' '.join(str(error).split())}") from None
    if entries is None:
        entries = []
    if not isinstance(entries, list):
        raise _refused(path, "must be a list of entries with name and hash")
    keys = tuple(_parse_entry(path, number, entry) for number, entry in enumerate(entries, 1))
    for field, values in (
        ("name", [key.caller.name for key in keys]),
        ("hash", [key.hash for key in keys]),
    ):
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise _refused(path, f"{field} {twice[0]!r} stands there twice")
    return keys


def _parse_entry(path: Path, number: int, entry: object) -> ApiKey:
    where = f"entry {number}"
    if not isinstance(entry, dict):
        raise _refused(path, f"{where} must be a mapping with name and hash")
    unknown = [field for field in entry if field not in FIELDS]
    if unknown:
        raise _refused(path, f"{where}: unknown field {unknown[0]!r}; known: {', '.join(FIELDS)}")
    name, digest = entry.get("name"), entry.get("hash")
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME:
        raise _refused(path, f"{where}: name must be 1 to {MAX_NAME} characters")
    if name == ANONYMOUS.name:
        raise _refused(path, f"{where}: the name {name!r} is for callers without a key")
    if not isinstance(digest, str) or not _is_hash(digest):
        raise _refused(path, f"{where} ({name}): hash must be {HASH_PREFIX} and 64 hex digits")
    caller = Caller(
        name,
        weight=_weight(path, f"{where} ({name})", entry),
        max_concurrent_requests=_limit(path, where, entry, "max_concurrent_requests"),
        max_tokens_per_minute=_limit(path, where, entry, "max_tokens_per_minute"),
        admin=_admin(path, where, entry),
    )
    return ApiKey(digest, caller)


def _is_hash(text: str) -> bool:
    digits = text.removeprefix(HASH_PREFIX)
    return text != digits and len(digits) == 64 and set(digits) <= set("0123456789abcdef")


def _weight(path: Path, where: str, entry: Mapping[str, Any]) -> float:
    value = entry.get("weight", 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e6:
        raise _refused(path, f"{where}: weight={value!r} must be a number above 0, at most 1e6")
    return float(value)


def _admin(path: Path, where: str, entry: Mapping[str, Any]) -> bool:
    value = entry.get("admin", False)
    if not isinstance(value, bool):
        raise _refused(path, f"{where}: admin={value!r} must be true or false")
    return value


def _limit(path: Path, where: str, entry: Mapping[str, Any], field: str) -> int | None:
    value = entry.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refused(path, f"{where}: {field}={value!r} must be a whole number of at least 1")
    return value


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise _refused(path, f"cannot be read: {error.strerror}") from None
    if stat.st_size > MAX_FILE_BYTES:
        raise _refused(path, f"{stat.st_size} bytes; a key file has at most {MAX_FILE_BYTES}")
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _text(path: Path) -> str:
    _identity(path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(path, f"cannot be read: {error}") from None


def _refused(path: Path, rule: str) -> ConfigError:
    return ConfigError("api_keys", str(path), rule)
