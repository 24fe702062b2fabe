"""Who a request comes from, and what that one may use.

Knows names, shares and limits. Knows no key: whoever checks a key makes a Caller.
"""

import hashlib
from dataclasses import dataclass

from moe_core.service.access import calling

TAG_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Caller:
    """`weight` is a share against other callers'; None is no limit. max_tokens_per_minute counts
    prompt and output tokens."""

    name: str
    weight: float = 1.0
    max_concurrent_requests: int | None = None
    max_tokens_per_minute: int | None = None

    @property
    def tag(self) -> str:
        """Stands for the name where it should not be read: of the same length for all."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:TAG_LENGTH]


ANONYMOUS = Caller("anonymous")


def caller_of_call() -> Caller:
    """Whose gRPC call this runs in: the access check has asked for the key."""
    caller = calling()
    assert isinstance(caller, Caller)
    return caller
