"""One requester's sequences on the engine, and the queue of what it is told about them.

Knows the ids that requesters use, which sequences they stand for, and whose they are. Knows neither
steps nor blocks: a `SequenceHost` does, and delivers.

An id is the same whichever requester uses it. So a requester that was lost can have a successor:
its sequences run on for `orphan_grace_s`, for whoever adds one of them with `take_over`.
"""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

from attn_service.sequence import (
    FinishReason,
    Sequence,
    SequenceOutput,
    SequenceRequest,
    StepOutput,
)
from moe_core.errors import RequestError, UnavailableError


@dataclass(frozen=True, slots=True)
class KnownSequence:
    """A sequence that runs for `holder`, or has ended for `reason`: one of them is None."""

    sequence: Sequence
    holder: "EngineStream | None"
    reason: FinishReason | None


class SequenceHost(Protocol):
    """What a stream asks of whoever holds the sequences (live_sequences.py)."""

    step: int
    failure: UnavailableError | None
    orphan_grace_s: float

    def add(self, stream: "EngineStream", request: SequenceRequest) -> Sequence: ...

    def discard(self, sequence: Sequence) -> None: ...

    def find(self, sequence_id: str) -> KnownSequence | None: ...

    def park(self, sequence: Sequence) -> None: ...

    def unpark(self, sequence_id: str) -> None: ...

    def hand_over(self, sequence: Sequence, stream: "EngineStream") -> None: ...

    def forget(self, stream: "EngineStream") -> None: ...


class EngineStream:
    """One requester's sequences and their outputs.

    It is open, then perhaps lost, then closed; a lost one closes with its last sequence.
    """

    def __init__(self, host: SequenceHost) -> None:
        self._host = host
        self._sequences: dict[str, Sequence] = {}
        self._outputs: asyncio.Queue[StepOutput | None] = asyncio.Queue()
        self._wants_more = True
        self._closing: asyncio.TimerHandle | None = None
        self._is_closed = False

    @property
    def is_lost(self) -> bool:
        """Whether its sequences run for whoever takes them over."""
        return self._closing is not None and not self._is_closed

    def sequence(self, sequence_id: str) -> Sequence | None:
        """The one of that id that runs for this stream."""
        return self._sequences.get(sequence_id)

    def add(self, request: SequenceRequest) -> None:
        """Queue a sequence, or take over the one that is here already. Raises RequestError for one
        that cannot be served or is another's, UnavailableError when the engine is stopping."""
        known = self._host.find(request.sequence_id)
        if known is not None and request.take_over and self._take_over(request, known):
            return
        holder = None if known is None else known.holder
        if holder is not None and not (holder.is_lost or request.take_over):
            raise RequestError(
                f"sequence_id={request.sequence_id!r}: already running; send another request_id"
            )
        sequence = self._host.add(self, request)
        if holder is not None:
            self._host.discard(holder.release(request.sequence_id))
        self._sequences[request.sequence_id] = sequence

    def abort(self, sequence_id: str) -> None:
        """End a sequence early. One that has ended already is no error: the two may cross."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is None:
            self._host.unpark(sequence_id)
            return
        self._host.discard(sequence)
        self.refuse(SequenceOutput(sequence_id, finish_reason=FinishReason.ABORT))

    def park(self, sequence_id: str) -> None:
        """Another group is to go on with a sequence: its last output is PARKED. One that has ended
        already is no error: the two may cross."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self._host.park(sequence)

    def release(self, sequence_id: str) -> Sequence:
        """Give up a sequence, which another stream takes; whoever may still read here is told."""
        sequence = self._sequences.pop(sequence_id)
        self.refuse(SequenceOutput(sequence_id, finish_reason=FinishReason.ABORT))
        return sequence

    def refuse(self, output: SequenceOutput) -> None:
        """Put an output that belongs to no step in line."""
        self._put(StepOutput(self._host.step, (output,)))

    def end_of_requests(self) -> None:
        """No request will come; `outputs` ends after the last sequence has ended."""
        self._wants_more = False
        self._end_if_idle()

    def lose(self) -> None:
        """The requester is gone without a word: what it had running goes on for `orphan_grace_s`
        seconds, for whoever takes it over. Nothing more is put out here."""
        if self._is_closed or self.is_lost:
            return
        self._outputs.put_nowait(None)
        loop = asyncio.get_running_loop()
        self._closing = loop.call_later(self._host.orphan_grace_s, self.close)
        self._end_if_idle()

    def close(self) -> None:
        """Abort all that is left; nothing more is put out."""
        self._is_closed = True
        if self._closing is not None:
            self._closing.cancel()
        for sequence in self._sequences.values():
            self._host.discard(sequence)
        self._sequences.clear()
        self._host.forget(self)
        self._outputs.put_nowait(None)

    async def outputs(self) -> AsyncIterator[StepOutput]:
        """One StepOutput per step that has news for this stream. Raises UnavailableError after
        the last one if the engine has failed."""
        while (output := await self._outputs.get()) is not None:
            yield output
        if self._host.failure is not None:
            raise self._host.failure

    def deliver(self, step: int, outputs: Many[SequenceOutput]) -> None:
        """What one step has for this stream; finished sequences leave it."""
        for output in outputs:
            if output.finish_reason is not None:
                del self._sequences[output.sequence_id]
        self._put(StepOutput(step, tuple(outputs)))

    def _take_over(self, request: SequenceRequest, known: KnownSequence) -> bool:
        """Go on with a sequence as it is; False where it cannot be told all after `output_ids`."""
        sequence, received = known.sequence, len(request.output_ids)
        _require_same(request, sequence.request)
        new = sequence.output_ids[received:]
        told = sequence.logprobs[max(0, len(sequence.logprobs) - len(new)) :]
        if sequence.output_ids[:received] != request.output_ids:
            return False
        if request.sampling.logprobs is not None and len(told) < len(new):
            return False
        if known.holder is not None:
            known.holder.release(request.sequence_id)
            self._host.hand_over(sequence, self)
            self._sequences[request.sequence_id] = sequence
        if new or known.reason is not None:
            self.refuse(
                SequenceOutput(
                    request.sequence_id,
                    new,
                    known.reason,
                    logprobs=tuple(told),
                    num_cached_tokens=0 if received else sequence.num_cached_prompt_tokens,
                    queued_us=None if received else sequence.queued_us,
                )
            )
        return True

    def _put(self, output: StepOutput) -> None:
        if not self.is_lost:
            self._outputs.put_nowait(output)
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self._sequences:
            return
        if self.is_lost:
            self.close()
        elif not self._wants_more:
            self._outputs.put_nowait(None)


def _require_same(request: SequenceRequest, known: SequenceRequest) -> None:
    for field in ("prompt_ids", "sampling"):
        if getattr(request, field) != getattr(known, field):
            raise RequestError(
                f"{field}: sequence_id={request.sequence_id!r} was begun with other {field}; "
                f"send the same request again"
            )
