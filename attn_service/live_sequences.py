"""The sequences that are in the engine: how they come, whose they are, and how they leave.

Knows streams of requesters, and who holds a sequence: the scheduler, or what brings its KV blocks
(adoptions.py). Knows no step and no tensors: engine.py computes, and puts out here what came of it.

While a step is under way a sequence that is no longer wanted is only noted, since the step still
writes to its KV blocks. It leaves in `settle`, between two steps.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Many

from attn_service.adoptions import Adoptions
from attn_service.ended_sequences import EndedSequences
from attn_service.engine_stream import EngineStream, KnownSequence
from attn_service.parked import ParkedBlocks
from attn_service.request_check import check_request
from attn_service.scheduler import Scheduler
from attn_service.sequence import FinishReason, Sequence, SequenceOutput, SequenceRequest
from attn_service.sequence_step import error_output, parked_output
from attn_service.step_runner import EngineObserver
from moe_core.errors import EpserveError, UnavailableError
from moe_core.parked_kv import ParkedKv


class LiveSequences:
    """A SequenceHost; `open_stream` is how work comes in. changed: called when the engine has
    something to do. step: the number of the last step that has begun. finished: ends by reason,
    since the engine began."""

    def __init__(
        self,
        scheduler: Scheduler,
        adoptions: Adoptions,
        parked: ParkedBlocks,
        *,
        vocab_size: int,
        orphan_grace_s: float,
        changed: Callable[[], None],
        observer: EngineObserver | None,
    ) -> None:
        self._scheduler = scheduler
        self._adoptions = adoptions
        self._vocab_size = vocab_size
        self._changed = changed
        self._observer = observer
        self._streams: set[EngineStream] = set()
        self._owner: dict[Sequence, EngineStream] = {}
        self._ended = EndedSequences(orphan_grace_s)
        self._discarded: set[Sequence] = set()
        self._parking: set[Sequence] = set()
        self._accepting = True
        self._idle = asyncio.Event()
        self.parked = parked
        self.orphan_grace_s = orphan_grace_s
        self.failure: UnavailableError | None = None
        self.finished: Counter[FinishReason] = Counter()
        self.step = 0

    def open_stream(self) -> EngineStream:
        """Raises UnavailableError when the engine has failed."""
        if self.failure is not None:
            raise self.failure
        stream = EngineStream(self)
        self._streams.add(stream)
        return stream

    def add(self, stream: EngineStream, request: SequenceRequest) -> Sequence:
        """Called by a stream, see `EngineStream.add`."""
        if not self._accepting:
            raise UnavailableError("this attention process is draining and takes no new sequences")
        check_request(request, self._vocab_size)
        sequence = Sequence(request)
        if request.kv_source is None:
            self._scheduler.add(sequence)
        else:
            self._adoptions.begin(sequence)
        self._ended.forget(request.sequence_id)
        self._owner[sequence] = stream
        self._idle.clear()
        self._changed()
        return sequence

    def discard(self, sequence: Sequence) -> None:
        """Called by a stream: nobody wants this sequence any more."""
        self._discarded.add(sequence)
        self._changed()

    def park(self, sequence: Sequence) -> None:
        """Called by a stream: another group is to go on with this sequence."""
        self._parking.add(sequence)
        self._changed()

    def unpark(self, sequence_id: str) -> None:
        """Called by a stream: what may have been kept of that sequence is not wanted."""
        self.parked.release(sequence_id)

    def find(self, sequence_id: str) -> KnownSequence | None:
        """The sequence of that id which runs, or has ended within `orphan_grace_s`."""
        for stream in self._streams:
            sequence = stream.sequence(sequence_id)
            if sequence is not None:
                return KnownSequence(sequence, stream, None)
        ended = self._ended.find(sequence_id)
        return None if ended is None else KnownSequence(ended[0], None, ended[1])

    def hand_over(self, sequence: Sequence, stream: EngineStream) -> None:
        """Called by a stream that takes a running sequence over."""
        self._owner[sequence] = stream

    def forget(self, stream: EngineStream) -> None:
        """Called by a stream that is closed."""
        self._streams.discard(stream)

    def is_wanted(self, sequence: Sequence) -> bool:
        return sequence not in self._discarded

    def settle(self) -> None:
        """Between two steps: let go of the sequences that are to leave. Raises as
        `Adoptions.check`."""
        self._adoptions.check()
        self._drop_discarded()
        self._park()
        if not (self._scheduler.has_work or self._adoptions.sequences):
            self._idle.set()

    def put_out(self, results: Many[tuple[Sequence, SequenceOutput]]) -> None:
        """What a step has for sequences that are wanted; those that are finished leave."""
        by_stream: defaultdict[EngineStream, list[SequenceOutput]] = defaultdict(list)
        for sequence, output in results:
            by_stream[self._owner[sequence]].append(output)
            if output.finish_reason is not None:
                self._count(sequence, output.finish_reason)
                if output.finish_reason is not FinishReason.ERROR:
                    self._ended.put(sequence, output.finish_reason)
                self._remove(sequence, reusable=output.finish_reason is not FinishReason.ERROR)
        for stream, outputs in by_stream.items():
            stream.deliver(self.step, outputs)

    def finish_with(
        self, code: str, message: str, sequences: Many[Sequence], *, go_elsewhere: bool = False
    ) -> None:
        """End those of `sequences` that are still wanted with an error."""
        wanted = filter(self.is_wanted, sequences)
        self.put_out(
            [(s, error_output(s, code, message, go_elsewhere=go_elsewhere)) for s in wanted]
        )

    def fail(self, error: BaseException) -> None:
        """End every sequence and stream with `error`, for good; only the first call counts."""
        if self.failure is not None:
            return
        cause: EpserveError = UnavailableError("this attention process is stopping")
        if isinstance(error, EpserveError):
            cause = error
        elif isinstance(error, Exception):
            cause = EpserveError(f"internal error: {type(error).__name__}: {error}")
        self._accepting = False
        self.failure = UnavailableError(f"the engine has stopped: {cause}")
        self._drop_discarded()
        everybody = [*self._scheduler.sequences(), *self._adoptions.sequences]
        self.finish_with(cause.code, str(cause), everybody, go_elsewhere=True)
        self._adoptions.close()
        self.parked.release_all()
        self._close_streams()
        self._idle.set()

    async def drain(self) -> None:
        """Take no more sequences, wait for those under way and for whoever fetches the KV blocks of
        parked ones, and end the streams in order. The caller sets the deadline."""
        self._accepting = False
        await self._idle.wait()
        await self.parked.until_empty()
        self._close_streams()

    def _close_streams(self) -> None:
        for stream in tuple(self._streams):
            stream.close()

    def _drop_discarded(self) -> None:
        for sequence in self._discarded:
            self._count(sequence, FinishReason.ABORT)
            self._remove(sequence)
        self._discarded.clear()

    def _park(self) -> None:
        """Let go of the sequences that are to leave, and keep what they have computed."""
        leaving = [each for each in self._parking if each in self._owner]
        self._parking.clear()
        for sequence in leaving:
            output = parked_output(sequence, self._keep(sequence))
            self._count(sequence, FinishReason.PARKED)
            self._owner.pop(sequence).deliver(self.step, [output])

    def _keep(self, sequence: Sequence) -> ParkedKv:
        """The sequence is nobody's any more; what has been kept of it."""
        if self._adoptions.cancel(sequence):
            return ParkedKv(0, ())
        return self.parked.park(sequence, self._scheduler.detach(sequence))

    def _count(self, sequence: Sequence, reason: FinishReason) -> None:
        self.finished[reason] += 1
        if self._observer is not None:
            self._observer.ended(sequence, reason)

    def _remove(self, sequence: Sequence, *, reusable: bool = True) -> None:
        if not self._adoptions.cancel(sequence):
            self._scheduler.remove(sequence, reusable=reusable)
        del self._owner[sequence]
