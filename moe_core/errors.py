"""The errors that cross module borders.

Every message says what went wrong, where, with which value, which rule it broke and what
would do. Knows nothing of gRPC: `code` holds the name of the status that a servicer answers
with, and the servicer translates it.
"""

import re
from collections.abc import Sequence

_FIELD = re.compile(r"[a-z_]+(?:\[[^\]]*\]|\.[a-z_]+)*(?=[=:])")


class EpserveError(Exception):
    """Base of all errors that a user may see as one line without a traceback."""

    code = "INTERNAL"

    @property
    def field(self) -> str | None:
        """The field that the message begins with, as in logit_bias[5] or messages[0].content."""
        found = _FIELD.match(str(self))
        return None if found is None else found.group()


class ConfigError(EpserveError):
    """A setting that cannot be used: names setting, value (None: it was not given), rule and the
    nearest valid values."""

    code = "INVALID_ARGUMENT"

    def __init__(
        self, setting: str, value: object, rule: str, nearest: Sequence[object] = ()
    ) -> None:
        self.setting = setting
        self.value = value
        self.rule = rule
        self.nearest = tuple(nearest)
        message = f"{setting}: {rule}" if value is None else f"{setting}={value!r}: {rule}"
        if self.nearest:
            message += f"; nearest valid: {', '.join(map(str, self.nearest))}"
        super().__init__(message)


class CheckpointError(EpserveError):
    """A checkpoint that cannot be served: names the file or tensor and what is wrong with it."""

    code = "FAILED_PRECONDITION"


class RequestError(EpserveError):
    """A request that is refused before it costs anything: names the field, value and rule.

    A message about one field begins with it, as in `top_k=-1: must be …` or `stop: …`.
    """

    code = "INVALID_ARGUMENT"


class NotFoundError(EpserveError):
    """A name that nothing here answers to; where a field holds it, the message begins with that."""

    code = "NOT_FOUND"


class AuthenticationError(EpserveError):
    """The caller has not shown who it is. Says the same of a wrong key and of an unknown one."""

    code = "UNAUTHENTICATED"


class AccessError(EpserveError):
    """The caller is known, and what it asks for is not for its role: names both."""

    code = "PERMISSION_DENIED"


class UnsupportedError(EpserveError):
    """A method of a known protocol that is not served here: says which, and why."""

    code = "UNIMPLEMENTED"


class TooManyRequestsError(EpserveError):
    """A request that is refused now for what others, or the same caller, have under way: names the
    limit. `retry_after_s`: when to try again, in seconds."""

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class UnavailableError(EpserveError):
    """Something that is needed is not there now: names who, and for what it was needed."""

    code = "UNAVAILABLE"


class TransportError(EpserveError):
    """An exchange with a peer failed: names peer, layer, bytes and phase."""

    code = "UNAVAILABLE"


class PeerLostError(TransportError):
    """The peer's process or its stream is gone."""


class PeerTimeoutError(TransportError):
    """The peer is there but did not answer within its deadline."""

    code = "DEADLINE_EXCEEDED"


class ProtocolError(TransportError):
    """The peer sent something that the contract does not allow, or the hellos do not match."""

    code = "FAILED_PRECONDITION"


class PeerFailedError(TransportError):
    """The peer answered that it could not do it: `code` is the status name that it gave."""

    def __init__(self, message: str, code: str) -> None:
        self.code = code
        super().__init__(message)
