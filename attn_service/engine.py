"""The loop that turns sequences into tokens, one step after the other.

Knows the scheduler, the sampler, and one `StepRunner` that computes a step. Knows no requester: how
sequences come and leave, and who is told, live_sequences.py knows. Knows no tensors beyond the
logits that pass through, no experts and no wire: what a step could not compute for want of an
expert is tried again for a while (blocked.py), a step that failed as a whole ends its sequences,
and the loop goes on.

Everything happens on one event loop. Between two steps the set of sequences is consistent.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from contextlib import suppress
from dataclasses import replace

import structlog

from attn_service.adoptions import Adoptions, KvFetcher
from attn_service.blocked import advanced, block, without_lost
from attn_service.counters import EngineCounters, counters_of, load_of, metrics_of
from attn_service.kv_blocks import BlockPool
from attn_service.live_sequences import LiveSequences
from attn_service.logprobs import token_logprobs
from attn_service.microbatches import ALWAYS_ONE, MicrobatchRule
from attn_service.parked import ParkedBlocks
from attn_service.sampler import sample
from attn_service.scheduler import Scheduled, Scheduler, SchedulerConfig
from attn_service.sequence import StepPlan
from attn_service.sequence_step import (
    next_output,
    prompt_output,
    row_of,
    slice_of,
    take_told,
)
from attn_service.step_runner import EngineObserver, StepResult, StepRunner
from attn_service.step_times import StepTimes
from moe_core.cluster import AttentionLoad, EngineMetrics
from moe_core.config.expert_wait import DEFAULT_EXPERT_WAIT_S
from moe_core.errors import TransportError, UnavailableError

log = structlog.get_logger(__name__)

DEFAULT_ORPHAN_GRACE_S = 5.0
LOOK_S = 0.01  # for blocks that were reserved


class Engine:
    """`run` must be running for anything to happen to `sequences`.

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
        self._runner = runner
        self._pool = pool
        self._scheduler = Scheduler(config, pool)
        self._placement_epoch = placement_epoch
        self._expert_wait_s = expert_wait_s
        self._microbatches = microbatches
        self._observer = observer
        self._changed = asyncio.Event()
        self._adoptions = Adoptions(self._scheduler, pool, kv_fetcher, self._changed.set)
        self._output_tokens = 0
        self._times = StepTimes()
        self.sequences = LiveSequences(
            self._scheduler,
            self._adoptions,
            ParkedBlocks(pool),
            vocab_size=vocab_size,
            orphan_grace_s=orphan_grace_s,
            changed=self._changed.set,
            observer=observer,
        )

    @property
    def load(self) -> AttentionLoad:
        return load_of(self._scheduler, self._pool, self._adoptions)

    @property
    def counters(self) -> EngineCounters:
        finished = self.sequences.finished
        return counters_of(self._scheduler, self._pool, self._output_tokens, finished)

    @property
    def metrics(self) -> EngineMetrics:
        """Totals since the engine began."""
        return metrics_of(self.counters, self._times, self._adoptions)

    async def run(self) -> None:
        """Steps for as long as there is work, and waits for more, until cancelled. Whatever ends
        it, a failure that is not the experts' or a cancellation, ends every sequence too."""
        try:
            while True:
                self.sequences.settle()
                if self._scheduler.has_work:
                    await self._run_step()
                    await asyncio.sleep(0)  # a step may never have waited: let requests in
                else:
                    self._changed.clear()
                    await self._changed.wait()
        except BaseException as error:
            self.sequences.fail(error)
            raise

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
            log.warning("the experts failed a step", step=plan.step, error=str(error))
            self.sequences.finish_with(error.code, str(error), [s.sequence for s in scheduled])
        else:
            self._end_blocked(scheduled, result.lost, started)
            kept = advanced(scheduled, result.lost)
            sampling_s = self._advance(kept, without_lost(scheduled, result))
            step_s = time.perf_counter() - started
            times = replace(result.times, step_s=step_s, sampling_s=sampling_s)
            self._times += times
            if self._observer is not None:
                self._observer.stepped(plan.step, [each.sequence for each in kept], times)

    def _end_blocked(
        self, scheduled: Many[Scheduled], lost: Mapping[int, str], started: float
    ) -> None:
        """What a step could not compute is tried again, or ends where it has waited too long."""
        now = time.perf_counter()
        for sequence, reason in block(scheduled, lost, started, now, self._expert_wait_s):
            self.sequences.finish_with(UnavailableError.code, reason, [sequence])

    async def _wait_for_change(self, timeout_s: float) -> None:
        """All there is is blocked, or lacks blocks that are reserved."""
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, timeout_s)):
                await self._changed.wait()

    def _plan(self, scheduled: Many[Scheduled]) -> StepPlan:
        self.sequences.step += 1
        slices = tuple(map(slice_of, scheduled))
        count = self._microbatches.count(slices)
        return StepPlan(self.sequences.step, self._placement_epoch(), slices, count)

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
        wanted = [each for each in new if self.sequences.is_wanted(each[0])]
        self._output_tokens += len(wanted)
        outputs = [(s, next_output(s, token, told)) for s, token, told in wanted]
        outputs += [(s, prompt_output(s)) for s in ended if self.sequences.is_wanted(s)]
        self.sequences.put_out(outputs)
        return sampling_s
