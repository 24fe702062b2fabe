"""The loop that turns requests into tokens, one step after the other.

Knows streams of requesters, the scheduler, the sampler, and one `StepRunner` that computes a
step. Knows no tensors beyond the logits that pass through, no experts and no wire: what a step
could not compute for want of an expert is tried again for a while (blocked.py), a step that failed
as a whole ends its sequences, and the loop goes on.

Everything happens on one event loop. Between two steps the set of sequences is consistent;
while a step is under way, a sequence that is no longer wanted is only noted, and leaves
when the step is over, since the step still writes to its KV blocks.
"""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from contextlib import suppress
from dataclasses import replace

import structlog
import torch

from attn_service.adoptions import Adoptions, KvFetcher
from attn_service.blocked import advanced, block, rows_of_advanced
from attn_service.counters import EngineCounters, counters_of, load_of, metrics_of
from attn_service.ended_sequences import EndedSequences
from attn_service.engine_stream import EngineStream, KnownSequence
from attn_service.kv_blocks import BlockPool
from attn_service.logprobs import token_logprobs
from attn_service.microbatches import ALWAYS_ONE, MicrobatchRule
from attn_service.parked import ParkedBlocks
from attn_service.request_check import check_request
from attn_service.sampler import sample
from attn_service.scheduler import Scheduled, Scheduler, SchedulerConfig
from attn_service.sequence import FinishReason, Sequence, SequenceOutput, SequenceRequest, StepPlan
from attn_service.sequence_step import (
    error_output,
    next_output,
    parked_output,
    prompt_output,
    row_of,
    slice_of,
    take_told,
)
from attn_service.step_runner import EngineObserver, StepResult, StepRunner
from attn_service.step_times import StepTimes
from moe_core.cluster import AttentionLoad, EngineMetrics
from moe_core.config.expert_wait import DEFAULT_EXPERT_WAIT_S
from moe_core.errors import EpserveError, TransportError, UnavailableError
from moe_core.parked_kv import ParkedKv

log = structlog.get_logger(__name__)

DEFAULT_ORPHAN_GRACE_S = 5.0
LOOK_S = 0.01  # for blocks that were reserved


class Engine:
    """`run` must be running for anything to happen; `open_stream` is how work comes in.

    placement_epoch: the one that the next step is to use. expert_wait_s: how long a sequence may be
    unable to advance for want of an expert. orphan_grace_s: for how long the sequences of a lost
    stream run on, and those that have ended are remembered. kv_fetcher: brings the KV blocks of
    sequences that another group has parked; without, they are computed again.
    """

    def __init__(
        self,
        runner: StepRunner,
        pool: BlockPool,
        config: SchedulerConfig,
        *,
        vocab_size: int,
        placement_epoch: Callable[[], int],
        expert_wait_s: float = DEFAULT_EXPERT_WAIT_S,
        microbatches: MicrobatchRule = ALWAYS_ONE,
        observer: EngineObserver | None = None,
        orphan_grace_s: float = DEFAULT_ORPHAN_GRACE_S,
        kv_fetcher: KvFetcher | None = None,
    ) -> None:
        self.orphan_grace_s = orphan_grace_s
        self._ended = EndedSequences(orphan_grace_s)
        self._runner = runner
        self._pool = pool
        self._scheduler = Scheduler(config, pool)
        self.parked = ParkedBlocks(pool)
        self._parking: set[Sequence] = set()
        self._vocab_size = vocab_size
        self._placement_epoch = placement_epoch
        self._expert_wait_s = expert_wait_s
        self._microbatches = microbatches
        self._observer = observer
        self._streams: set[EngineStream] = set()
        self._owner: dict[Sequence, EngineStream] = {}
        self._discarded: set[Sequence] = set()
        self._changed = asyncio.Event()
        self._adoptions = Adoptions(self._scheduler, pool, kv_fetcher, self._changed.set)
        self._idle = asyncio.Event()
        self._accepting = True
        self._finished: Counter[FinishReason] = Counter()
        self._output_tokens = 0
        self.failure: UnavailableError | None = None
        self.step = 0
        self.times = StepTimes()

    @property
    def load(self) -> AttentionLoad:
        return load_of(self._scheduler, self._pool, self._adoptions)

    @property
    def counters(self) -> EngineCounters:
        return counters_of(self._scheduler, self._pool, self._output_tokens, self._finished)

    @property
    def metrics(self) -> EngineMetrics:
        """Totals since the engine began."""
        return metrics_of(self.counters, self.times, self._adoptions)

    def open_stream(self) -> EngineStream:
        """Raises UnavailableError when the engine has failed."""
        if self.failure is not None:
            raise self.failure
        stream = EngineStream(self)
        self._streams.add(stream)
        return stream

    async def run(self) -> None:
        """Steps for as long as there is work, and waits for more, until cancelled. Whatever ends
        it, a failure that is not the experts' or a cancellation, ends every sequence too."""
        try:
            while True:
                self._adoptions.check()
                self._drop_discarded()
                self._park()
                if self._scheduler.has_work:
                    await self._run_step()
                    await asyncio.sleep(0)  # a step may never have waited: let requests in
                else:
                    if not self._adoptions.sequences:
                        self._idle.set()
                    self._changed.clear()
                    await self._changed.wait()
        except BaseException as error:
            self.fail(error)
            raise

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
        self._finish_with(cause.code, str(cause), everybody, go_elsewhere=True)
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
        self._changed.set()
        return sequence

    def discard(self, sequence: Sequence) -> None:
        """Called by a stream: nobody wants this sequence any more."""
        self._discarded.add(sequence)
        self._changed.set()

    def park(self, sequence: Sequence) -> None:
        """Called by a stream: another group is to go on with this sequence."""
        self._parking.add(sequence)
        self._changed.set()

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

    def _close_streams(self) -> None:
        for stream in tuple(self._streams):
            stream.close()

    def forget(self, stream: EngineStream) -> None:
        """Called by a stream that is closed."""
        self._streams.discard(stream)

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
        self._finished[reason] += 1
        if self._observer is not None:
            self._observer.ended(sequence, reason)

    def _remove(self, sequence: Sequence, *, reusable: bool = True) -> None:
        if not self._adoptions.cancel(sequence):
            self._scheduler.remove(sequence, reusable=reusable)
        del self._owner[sequence]

    def wake(self) -> None:
        """An expert process may be there again: try what is blocked at once."""
        for sequence in self._scheduler.sequences():
            sequence.retry_at = 0.0
        self._changed.set()

    async def _run_step(self) -> None:
        started = time.perf_counter()
        scheduled = self._scheduler.schedule(started)
        if not scheduled:
            least = LOOK_S if self._adoptions.holds_blocks else 0.0
            await self._wait_for_change(max(least, self._scheduler.next_retry - started))
            return
        for item in scheduled:
            item.sequence.started_s = item.sequence.started_s or started
        plan = self._plan(scheduled)
        try:
            result = await self._runner.execute(plan)
        except TransportError as error:
            log.warning("the experts failed a step", step=self.step, error=str(error))
            self._finish_with(error.code, str(error), [s.sequence for s in scheduled])
        else:
            self._end_blocked(scheduled, result.lost, started)
            kept = advanced(scheduled, result.lost)
            sampling_s = self._advance(kept, self._without_lost(scheduled, result))
            step_s = time.perf_counter() - started
            times = replace(result.times, step_s=step_s, sampling_s=sampling_s)
            self.times += times
            if self._observer is not None:
                self._observer.stepped(self.step, [each.sequence for each in kept], times)

    def _end_blocked(
        self, scheduled: Many[Scheduled], lost: Mapping[int, str], started: float
    ) -> None:
        """What a step could not compute is tried again, or ends where it has waited too long."""
        now = time.perf_counter()
        for sequence, reason in block(scheduled, lost, started, now, self._expert_wait_s):
            self._finish_with(UnavailableError.code, reason, [sequence])

    @staticmethod
    def _without_lost(scheduled: Many[Scheduled], result: StepResult) -> StepResult:
        """The outcome of those that the step has computed, as if there had been no others."""
        if not result.lost:
            return result
        rows = rows_of_advanced(scheduled, result.lost)
        logits = result.logits[torch.tensor(rows, dtype=torch.int64)]
        kept = [index for index in range(len(scheduled)) if index not in result.lost]
        told = {new: result.told[old] for new, old in enumerate(kept) if old in result.told}
        return StepResult(logits, result.times, told=told)

    async def _wait_for_change(self, timeout_s: float) -> None:
        """All there is is blocked, or lacks blocks that are reserved."""
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, timeout_s)):
                await self._changed.wait()

    def _plan(self, scheduled: Many[Scheduled]) -> StepPlan:
        self.step += 1
        slices = tuple(map(slice_of, scheduled))
        count = self._microbatches.count(slices)
        return StepPlan(self.step, self._placement_epoch(), slices, count)

    def _advance(self, scheduled: Many[Scheduled], result: StepResult) -> float:
        """Count what was computed, sample where a sequence has caught up, and put it out. Returns
        the seconds that sampling took."""
        ready = [s.sequence for s in scheduled if s.needs_logits]
        ended = [s.sequence for s in scheduled if s.catches_up and not s.needs_logits]
        for index, told in result.told.items():
            take_told(scheduled[index].sequence, told)
        for item in scheduled:
            self._scheduler.computed(item)
        logits = result.logits
        rows = [row_of(sequence) for sequence in ready]
        started = time.perf_counter()
        tokens = sample(logits, rows) if rows else []
        logprobs = token_logprobs(logits, [row.sampling.logprobs for row in rows], tokens)
        sampling_s = time.perf_counter() - started
        new = zip(ready, tokens, logprobs, strict=True)
        wanted = [each for each in new if each[0] not in self._discarded]
        self._output_tokens += len(wanted)
        outputs = [(s, next_output(s, token, told)) for s, token, told in wanted]
        outputs += [(s, prompt_output(s)) for s in ended if s not in self._discarded]
        self._put_out(outputs)
        return sampling_s

    def _put_out(self, results: Many[tuple[Sequence, SequenceOutput]]) -> None:
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

    def _finish_with(
        self, code: str, message: str, sequences: Many[Sequence], *, go_elsewhere: bool = False
    ) -> None:
        """End those of `sequences` that are still wanted with an error."""
        wanted = [s for s in sequences if s not in self._discarded]
        self._put_out(
            [(s, error_output(s, code, message, go_elsewhere=go_elsewhere)) for s in wanted]
        )
