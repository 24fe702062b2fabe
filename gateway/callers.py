"""Who a request comes from, and what that one may use.

Knows names, shares and limits. Knows no key and no transport: whoever checks a key makes a Caller.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """`weight` is a share against other callers'; None is no limit. max_tokens_per_minute counts
    prompt and output tokens."""

    name: str
    weight: float = 1.0
    max_concurrent_requests: int | None = None
    max_tokens_per_minute: int | None = None


ANONYMOUS = Caller("anonymous")
