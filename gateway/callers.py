"""Who a request comes from, and what that one may use.

Knows names, shares and limits. Knows no key: whoever checks a key makes a Caller.
"""

import hashlib
from dataclasses import dataclass, field

from moe_core.service.access import calling

TAG_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Caller:
    """`weight` is a share against other callers'; None is no limit. max_tokens_per_minute counts
    prompt and output tokens. `admin` may also change the cluster. `tag` stands for the name where
    it should not be read: of the same length for all."""

    name: str
    weight: float = 1.0
    max_concurrent_requests: int | None = None
    max_tokens_per_minute: int | None = None
    admin: bool = False
    tag: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.name.encode()).hexdigest()
        object.__setattr__(self, "tag", digest[:TAG_LENGTH])

    @property
    def anonymous(self) -> bool:
        """Nobody is asked for a key."""
        return self == ANONYMOUS


ANONYMOUS = Caller("anonymous")


def caller_of_call() -> Caller:
    """Whose gRPC call this runs in: the access check has asked for the key."""
    caller = calling()
    assert isinstance(caller, Caller)
    return caller
