"""A request while it runs: its choices on one group, and on another where that one is lost.

Knows which tokens of each choice have come, and how a choice goes on elsewhere. What the tokens
become, SequenceOutput says; knows no client. What counts as a lost group, and what does not, is
GroupLostError's to say.

A choice that moves is given to the next group with the tokens that have come. What a lost group
had generated beyond them is generated again, and is the same: sampling is keyed by seed, index and
position, and the seed was fixed when the request was admitted. A group that leaves has said all,
and keeps what it has computed for the next one to fetch.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import Generic, TypeVar

import structlog

from gateway.attention_pool import AttentionPool
from gateway.groups import Group, GroupKey
from gateway.observers import RequestWatch
from gateway.place import Place
from gateway.request_stream import ABORTED, Delta, GroupLostError
from gateway.requests import Chunk, Sequence
from gateway.sequence_output import SequenceOutput
from moe_core.errors import UnavailableError
from moe_core.parked_kv import KvSource, ParkedKv

log = structlog.get_logger(__name__)
Shaped = TypeVar("Shaped")

# A request that ends every process that it runs on must not end all of them.
MAX_LOSSES = 5


class GroupLeavingError(GroupLostError):
    """The group drains. It would finish the request, but another can."""


class RunningRequest(Generic[Shaped]):
    """`place` has a seat in `group`. With `take_over` the group may have the choices already.

    Tokens become what the client is sent where they arrive, those of all requests of a step in one
    go: the same code and data serve one after the other, which costs a third less than with every
    request's writing in between (docs/performance.md). A request's task is woken for what is ready.
    """

    def __init__(
        self,
        pool: AttentionPool,
        place: Place,
        choices: Many[Sequence],
        outputs: Many[SequenceOutput],
        shape: Callable[[Chunk], Shaped | None],
        group: Group,
        watch: RequestWatch,
        *,
        take_over: bool = False,
    ) -> None:
        """`outputs`: of `choices`, in the order of their indices. `shape` makes of a chunk what
        `next` gives, and is called once for each, in their order; what it makes None of, it has
        dealt with itself."""
        self._pool = pool
        self._place = place
        self._group = group
        self._watch = watch
        self._outputs = outputs
        self._shape = shape
        self._running = {choice.index: choice for choice in choices}
        self._received: dict[int, list[int]] = {choice.index: [] for choice in choices}
        self._losses = 0
        self._ready: list[Shaped] = []
        self._failure: Exception | None = None
        self._waiting: asyncio.Future[None] | None = None
        self._stream = pool.submit(group, choices, self, take_over=take_over)

    @property
    def ended(self) -> bool:
        """Whether `next` has nothing more to give or to raise."""
        return not (self._running or self._ready or self._failure)

    async def next(self) -> list[Shaped]:
        """All that has come and says something; waits until there is any, or an end. Raises
        UnavailableError where the group was lost and no other goes on, or the error with which an
        engine ended a choice, once what came before it was given. How long to wait is the client's
        deadline: a lost group always ends the wait."""
        while not (self._ready or self.ended):
            failure, self._failure = self._failure, None
            if isinstance(failure, GroupLostError):
                await self._go_on_elsewhere(failure)
            elif failure is not None:
                raise failure
            else:
                self._waiting = asyncio.get_running_loop().create_future()
                await self._waiting
        ready, self._ready = self._ready, []
        return ready

    def take(self, index: int, delta: Delta) -> None:
        """See Taker. Only the first group's words on the prompt count."""
        received = self._received[index]
        if delta.token_ids:
            self._place.received(len(delta.token_ids), delta.cached_tokens)
        if received and (delta.cached_tokens or delta.queued_s is not None):
            delta = replace(delta, cached_tokens=0, queued_s=None)
        received.extend(delta.token_ids)
        if delta.queued_s is not None:
            self._watch.queued(delta.queued_s)
        chunk = self._outputs[index].push(delta)
        if chunk.finish_reason:
            self._drop(index)
        if chunk.token_ids or chunk.text or chunk.finish_reason:
            self._watch.put_out(chunk)
            shaped = self._shape(chunk)
            if shaped is not None:
                self._ready.append(shaped)
        if self._ready or not self._running:
            self._wake()

    def fail(self, error: Exception) -> None:
        """See Taker."""
        self._failure = error
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def _drop(self, index: int) -> None:
        """Let go of one choice, which has ended here or there."""
        if self._running.pop(index, None) is not None:
            self._stream.drop(index)
            self._place.ended()

    def abort(self) -> None:
        """End the request now: `next` gives each choice that is still running a last chunk."""
        self._place.abort()
        self._stream.abort()

    def leave(self, leaving: Collection[GroupKey]) -> None:
        """Move on if the group is one of `leaving` and there is another now; else stay, and end
        there if it lasts so long."""
        if self._group.key in leaving and self._place.has_other_group():
            self._stream.leave(GroupLeavingError(f"{self._group.name} is leaving"))

    def close(self) -> None:
        """Let go of all choices."""
        self._stream.close()

    async def _go_on_elsewhere(self, lost: GroupLostError) -> None:
        """Find another group for what has not ended."""
        self._stream.close()
        if self._place.aborted:
            return self._end(dict.fromkeys(self._running, ABORTED))
        parked = self._stream.parked if isinstance(lost, GroupLeavingError) else {}
        self._losses += not isinstance(lost, GroupLeavingError)
        if self._losses > MAX_LOSSES:
            raise UnavailableError(f"{lost}; so were {MAX_LOSSES} groups before it: giving up")
        self._end(self._complete())
        if not self._running:
            return None
        rest = [
            _continued(each, self._received[index], self._source(parked.get(index)))
            for index, each in self._running.items()
        ]
        try:
            group = await self._place.next_group(rest, self._group)
        except UnavailableError as error:
            raise UnavailableError(f"{lost}; {error}") from None
        if group is None:
            return self._end(dict.fromkeys(self._running, ABORTED))
        log.info(
            "a request goes on elsewhere",
            request_id=rest[0].request_id,
            cause=str(lost),
            to=group.name,
            tokens=[len(each.output_ids) for each in rest],
        )
        self._group = group
        self._stream = self._pool.submit(group, rest, self, take_over=True)
        self._watch.moved(group.dp_rank)
        return None

    def _source(self, parked: ParkedKv | None) -> KvSource | None:
        """What the group that is left keeps of a choice."""
        if parked is None:
            return None
        return KvSource(self._group.dp_rank, self._group.leader.instance_epoch, parked)

    def _complete(self) -> dict[int, str]:
        """The choices of which all tokens have come, and only the word that they were the last:
        why they ended."""
        reasons = {
            index: _end_of(choice, self._received[index]) for index, choice in self._running.items()
        }
        return {index: reason for index, reason in reasons.items() if reason}

    def _end(self, reasons: Mapping[int, str]) -> None:
        """End choices that no group has any more."""
        for index, reason in reasons.items():
            del self._running[index]
            self.take(index, Delta((), reason))


def _continued(choice: Sequence, received: Many[int], source: KvSource | None) -> Sequence:
    """How a choice goes on elsewhere: another group fetches what `source` has computed of it, and
    computes the rest from its tokens. The one place that decides so. What is told of the prompt has
    come with the first token."""
    asked = None if received else choice.prompt_logprobs
    return replace(choice, output_ids=tuple(received), prompt_logprobs=asked, kv_source=source)


def _end_of(choice: Sequence, received: Many[int]) -> str:
    """Why `received` is all of a choice; empty where it is not."""
    if not received:
        return ""
    if received[-1] in choice.stop_token_ids:
        return "stop"
    return "length" if len(received) >= choice.max_tokens else ""
