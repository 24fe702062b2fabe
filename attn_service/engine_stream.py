"""One requester's sequences on the engine, and the queue of what it is told about them.

Knows the requester's own ids and which sequences they stand for. Knows neither steps nor blocks:
the engine does what `SequenceHost` says, and delivers.
"""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Sequence as Many
from typing import Protocol

from attn_service.sequence import (
    FinishReason,
    Sequence,
    SequenceOutput,
    SequenceRequest,
    StepOutput,
)
from moe_core.errors import RequestError, UnavailableError


class SequenceHost(Protocol):
    """What a stream asks of its engine."""

    step: int
    failure: UnavailableError | None

    def add(self, stream: "EngineStream", request: SequenceRequest) -> Sequence: ...

    def discard(self, sequence: Sequence) -> None: ...

    def forget(self, stream: "EngineStream") -> None: ...


class EngineStream:
    """One requester's sequences and their outputs; ids are the requester's own."""

    def __init__(self, engine: SequenceHost) -> None:
        self._engine = engine
        self._sequences: dict[str, Sequence] = {}
        self._outputs: asyncio.Queue[StepOutput | None] = asyncio.Queue()
        self._wants_more = True

    def add(self, request: SequenceRequest) -> None:
        """Queue a sequence. Raises RequestError for one that cannot be served, UnavailableError
        when the engine is stopping."""
        if request.sequence_id in self._sequences:
            raise RequestError(
                f"sequence_id={request.sequence_id!r}: already running on this stream"
            )
        self._sequences[request.sequence_id] = self._engine.add(self, request)

    def abort(self, sequence_id: str) -> None:
        """End a sequence early. One that has ended already is no error: the two may cross."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is None:
            return
        self._engine.discard(sequence)
        self.refuse(SequenceOutput(sequence_id, finish_reason=FinishReason.ABORT))

    def refuse(self, output: SequenceOutput) -> None:
        """Put an output that belongs to no step in line."""
        self._outputs.put_nowait(StepOutput(self._engine.step, (output,)))
        self._end_if_idle()

    def end_of_requests(self) -> None:
        """No request will come; `outputs` ends after the last sequence has ended."""
        self._wants_more = False
        self._end_if_idle()

    def close(self) -> None:
        """Abort all that is left; nothing more is put out."""
        for sequence in self._sequences.values():
            self._engine.discard(sequence)
        self._sequences.clear()
        self._engine.forget(self)
        self._outputs.put_nowait(None)

    async def outputs(self) -> AsyncIterator[StepOutput]:
        """One StepOutput per step that has news for this stream. Raises UnavailableError after
        the last one if the engine has failed."""
        while (output := await self._outputs.get()) is not None:
            yield output
        if self._engine.failure is not None:
            raise self._engine.failure

    def deliver(self, step: int, outputs: Many[SequenceOutput]) -> None:
        """What one step has for this stream; finished sequences leave it."""
        for output in outputs:
            if output.finish_reason is not None:
                del self._sequences[output.sequence_id]
        self._outputs.put_nowait(StepOutput(step, tuple(outputs)))
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if not self._sequences and not self._wants_more:
            self._outputs.put_nowait(None)
