"""A request whose gateway was lost, as its client brings it to this one.

Knows what a client may resume, and how to find which group has it. Knows no text: what the client
has already, SequenceOutput leaves out.

A gateway ends what its own clients leave. So only a gateway's end leaves sequences behind, and only
for `orphan_grace_s`; a client that has lost its connection to a gateway that lives begins again.
"""

import asyncio
from collections.abc import Sequence as Many
from dataclasses import dataclass

import structlog

from gateway.attention_pool import AttentionPool
from gateway.groups import Group, known_groups
from gateway.requests import GenerationRequest, Sequence
from moe_core.cluster import ClusterState
from moe_core.errors import EpserveError, NotFoundError, RequestError, UnavailableError

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """Some of a request's choices are on `group`; the others follow from the same seed."""

    group: Group
    seed: int


def check_resumption(request: GenerationRequest, choices: Many[Sequence]) -> None:
    """Raises RequestError naming what of resume_from cannot be."""
    received = request.resume_from or ()
    if received and request.sampling.prompt_logprobs is not None:
        raise RequestError(
            "resume_from: what is told of a prompt is told once, so a request with prompt_logprobs "
            "cannot be resumed; send it without resume_from to begin again"
        )
    if len(received) > len(choices):
        raise RequestError(
            f"resume_from: {len(received)} counts for a request of {len(choices)} choices"
        )
    if received and max(received) > choices[0].max_tokens:
        raise RequestError(
            f"resume_from: {max(received)} tokens of a choice of max_tokens="
            f"{choices[0].max_tokens} at most"
        )


async def find(
    pool: AttentionPool, state: ClusterState, request: GenerationRequest, choices: Many[Sequence]
) -> Found | None:
    """Where the request runs or has just ended; None where it can be generated again from its
    start, with the same tokens.

    Raises NotFoundError where it is nowhere and its seed is unknown, UnavailableError where a group
    that may have it cannot be asked.
    """
    groups = known_groups(state)
    ids = [choice.sequence_id for choice in choices]
    answers = await asyncio.gather(
        *(pool.find(group, ids) for group in groups), return_exceptions=True
    )
    silent = []
    for group, answer in zip(groups, answers, strict=True):
        if isinstance(answer, EpserveError):
            log.info("a group was not asked for a request", group=group.name, reason=str(answer))
            silent.append(f"{group.name}: {answer}")
        elif isinstance(answer, BaseException):
            raise answer
        elif answer:
            return Found(group, next(iter(answer.values())))
    if request.sampling.seed is not None or choices[0].temperature == 0.0:
        return None
    present = {group.dp_rank for group in groups}
    away = [rank for rank in range(state.parallel.dp_size) if rank not in present]
    silent += [f"attention group dp_rank={rank}: not joined" for rank in away]
    if silent:
        raise UnavailableError(
            f"request_id={request.request_id!r}: not found, but there are groups that cannot be "
            f"asked now; try again: {'; '.join(silent)}"
        )
    raise NotFoundError(
        f"request_id={request.request_id!r}: no attention group has it (any more), and its seed is "
        f"not known; send it without resume_from to begin again, and with a seed or temperature=0 "
        f"to be able to resume at any time"
    )
