"""How long a sequence that no step can compute for want of an expert is tried again, and how often.

Knows one sequence and two times of time.perf_counter. Knows neither why an expert is missing nor
what becomes of the others in the step.
"""

from attn_service.sequence import Sequence

# Trying costs a step, most of which is for nothing; so the longer it has waited, the seldomer.
MIN_RETRY_S = 0.02
MAX_RETRY_S = 0.5


def block(sequence: Sequence, started: float, now: float) -> None:
    """A step that began at `started` could not compute it."""
    if sequence.blocked_since is None:
        sequence.blocked_since = started
    waited_s = now - sequence.blocked_since
    sequence.retry_at = now + min(MAX_RETRY_S, max(MIN_RETRY_S, waited_s / 2))


def has_waited(sequence: Sequence, now: float, expert_wait_s: float) -> bool:
    """Whether it has been blocked for as long as it may be."""
    return sequence.blocked_since is not None and now - sequence.blocked_since >= expert_wait_s


def in_words(reason: str, sequence: Sequence, now: float) -> str:
    """What its requester is told."""
    waited_s = 0.0 if sequence.blocked_since is None else now - sequence.blocked_since
    return f"{reason} (waited {waited_s:.3g} s for that)"
