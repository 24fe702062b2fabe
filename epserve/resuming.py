"""A generation that outlives its gateway: resumed at the next one that answers.

Knows which tokens of each choice have come. Knows no wire: the client does.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from itertools import cycle

from epserve.client import EpserveClient
from epserve.generate_messages import Output, Sampling
from moe_core.errors import UnavailableError

RETRY_S = 0.1


async def generate_resuming(
    clients: Sequence[EpserveClient],
    prompt: str | Sequence[int],
    sampling: Sampling | None = None,
    *,
    model: str = "",
    request_id: str = "",
    resume_s: float = 5.0,
    idle_timeout_s: float = 120.0,
) -> AsyncGenerator[Output, None]:
    """As EpserveClient.generate with the first of `clients`. Whenever a gateway is unavailable, the
    next is asked to go on, then the first again, until none has had a token for `resume_s` seconds:
    then its UnavailableError is raised. NotFoundError says that nobody has the request any more.
    """
    sampling = sampling or Sampling()
    request_id = request_id or uuid.uuid4().hex
    received = [0] * (sampling.n or 1)
    ended: set[int] = set()
    resume_from: Sequence[int] = ()  # nothing to resume until a gateway has had the request
    give_up_at = time.monotonic() + resume_s
    for client in cycle(clients):
        try:
            answers = client.generate(
                prompt,
                sampling,
                model=model,
                request_id=request_id,
                resume_from=resume_from,
                idle_timeout_s=idle_timeout_s,
            )
            async with aclosing(answers) as outputs:
                async for output in outputs:
                    give_up_at = time.monotonic() + resume_s
                    received[output.index] += len(output.token_ids)
                    if output.index not in ended:
                        yield output
                    if output.finish_reason:
                        ended.add(output.index)
        except UnavailableError:
            if len(ended) == len(received):
                return
            if time.monotonic() > give_up_at:
                raise
            resume_from = received if any(received) else ()
            await asyncio.sleep(RETRY_S)
        else:
            return


class ResumingClient:
    """Generates as the first of `clients` does, and resumes at the next; see generate_resuming."""

    def __init__(self, clients: Sequence[EpserveClient], resume_s: float) -> None:
        self._clients = clients
        self._resume_s = resume_s

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        *,
        request_id: str = "",
        idle_timeout_s: float = 120.0,
    ) -> AsyncGenerator[Output, None]:
        return generate_resuming(
            self._clients,
            prompt,
            sampling,
            request_id=request_id,
            resume_s=self._resume_s,
            idle_timeout_s=idle_timeout_s,
        )
