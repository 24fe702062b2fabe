"""What becomes of sequences that a step could not compute for want of an expert.

Knows a step's outcome, sequences and times of time.perf_counter. Knows neither why an expert is
missing nor how sequences are ended.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Many

import structlog
import torch

from attn_service.scheduler import Scheduled
from attn_service.sequence import Sequence
from attn_service.step_runner import StepResult

log = structlog.get_logger(__name__)

# Trying costs a step, most of which is for nothing; so the longer it has waited, the seldomer.
MIN_RETRY_S = 0.02
MAX_RETRY_S = 0.5


def advanced(scheduled: Many[Scheduled], lost: Mapping[int, str]) -> Many[Scheduled]:
    """Those that the step has computed; they are not blocked any more. lost: as in StepResult."""
    kept = scheduled
    if lost:
        kept = [item for index, item in enumerate(scheduled) if index not in lost]
    for item in kept:
        item.sequence.blocked_since = None
    return kept


def without_lost(scheduled: Many[Scheduled], result: StepResult) -> StepResult:
    """The outcome of those that the step has computed, as if there had been no others."""
    lost = result.lost
    if not lost:
        return result
    wanted = [index for index, item in enumerate(scheduled) if item.needs_logits]
    rows = [row for row, index in enumerate(wanted) if index not in lost]
    logits = result.logits[torch.tensor(rows, dtype=torch.int64)]
    kept = [index for index in range(len(scheduled)) if index not in lost]
    told = {new: result.told[old] for new, old in enumerate(kept) if old in result.told}
    return StepResult(logits, result.times, told=told)


def block(
    scheduled: Many[Scheduled],
    lost: Mapping[int, str],
    started: float,
    now: float,
    expert_wait_s: float,
) -> list[tuple[Sequence, str]]:
    """Have the others tried again some time from `now`. Returns those that have waited for
    `expert_wait_s`, and what to tell their requesters. started: when the step began."""
    expired = []
    for index, reason in lost.items():
        sequence = scheduled[index].sequence
        if sequence.blocked_since is None:
            sequence.blocked_since = started
            log.warning("an expert is missing", reason=reason)
        waited_s = now - sequence.blocked_since
        sequence.retry_at = now + min(MAX_RETRY_S, max(MIN_RETRY_S, waited_s / 2))
        if waited_s >= expert_wait_s:
            expired.append((sequence, f"{reason} (waited {waited_s:.3g} s)"))
    return expired
