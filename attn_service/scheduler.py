"""Which tokens the next step computes, and which blocks hold them.

Knows waiting and running sequences, one token budget per step, the block pool and its prefix
cache. Knows no tensors, no sampling and no clients.

There are no phases: a sequence is behind by `num_pending_tokens` (its prompt at first, one
token later on), and a step lets sequences catch up as far as budget and blocks go. All is done
in one order, `Sequence.order`: by priority, then by arrival. A step first serves the running
sequences that are one token behind, then gives what is left of the budget, in that order, to
prompts, running or waiting. Since `max_num_seqs <= max_step_tokens`, a long prompt is one step's
budget at most between a running sequence and its next token.

Blocks are taken as tokens come. A sequence is admitted when its tokens fit into free blocks that
no running one needs, now or for its next `growth_blocks` blocks. Nobody who comes later in the
order is admitted before it, except past one that is held back (prefix_wait.py), whose place is
kept. Where a running sequence finds no block for its next token, the last running one in the
order is preempted, again and again: its blocks are freed, and it waits, in its place in the
order, to compute all its tokens once more (those whose blocks nobody took meanwhile are found in
the cache). The last one itself keeps its blocks and is passed over.

Why every sequence ends (no livelock). The order is total and never changes for a sequence.
1. Of the running sequences, the first in the order gets at least one token in every step: the
   others one token behind are fewer than the budget, and only sequences after it in the order
   are preempted for another, so it loses nothing; all blocks but its own can be freed for it,
   and `check` has seen that it fits into the pool alone. It ends after finitely many steps.
2. Take the first in the order of all sequences. Running, it ends by 1. Waiting, nobody is
   admitted before it, except past it while it is held back for one that comes before it, and
   there is none. So the running ones end, one after the other by 1, until it is admitted, at
   the latest into an empty pool.
3. So, unless ever more come before it in the order, every sequence becomes the first, and ends.
A sequence that comes with its keys and values (`reserve`) runs at once, if blocks are spare: it has
had its turn elsewhere. What is reserved for it is out of reach for a bounded time.

A sequence that is blocked for want of an expert is passed over until it is to be tried again. It
keeps its place in the order, and while it runs its blocks; it is blocked for a bounded time, since
the engine ends it after that.
"""

import heapq
import itertools
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from attn_service.kv_blocks import BlockPool
from attn_service.prefix_cache import PrefixCache
from attn_service.prefix_wait import PrefixWait
from attn_service.sequence import Sequence, SequenceRequest
from moe_core.errors import ConfigError, RequestError, UnavailableError

_ORDER = attrgetter("order")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """max_step_tokens: budget of one step. max_model_len: prompt and outputs together.
    growth_blocks: free blocks that admitting a sequence leaves for each that runs."""

    max_num_seqs: int
    max_step_tokens: int
    max_model_len: int
    growth_blocks: int = 2

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError("max_num_seqs", self.max_num_seqs, "must be at least 1", (1,))
        if self.max_step_tokens < self.max_num_seqs:
            raise ConfigError(
                "max_step_tokens",
                self.max_step_tokens,
                f"a step must have room for one token of each of max_num_seqs="
                f"{self.max_num_seqs} sequences",
                (self.max_num_seqs,),
            )
        if self.max_model_len < 2:
            raise ConfigError(
                "max_model_len", self.max_model_len, "needs room for a prompt and an output", (2,)
            )
        if self.growth_blocks < 0:
            raise ConfigError("growth_blocks", self.growth_blocks, "must be at least 0", (0,))


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`num_new_tokens` of `sequence`, from its computed tokens on, are computed next."""

    sequence: Sequence
    num_new_tokens: int

    @property
    def catches_up(self) -> bool:
        """Whether the step computes the sequence's last token, so that the next can follow."""
        return self.num_new_tokens == self.sequence.num_pending_tokens

    @property
    def needs_logits(self) -> bool:
        """Whether the next token is chosen after the step."""
        return self.catches_up and self.sequence.request.sampling.max_tokens > 0


@dataclass(slots=True)
class _Step:
    """A step in the making: tokens and running places that are left, and what is computed."""

    budget: int
    seats: int
    counts: dict[Sequence, int] = field(default_factory=dict)


class Scheduler:
    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self._config = config
        self._pool = pool
        self._waiting: list[Sequence] = []  # both are kept in the order of service
        self._running: list[Sequence] = []
        self._arrivals = itertools.count()
        self.cache = PrefixCache(pool)
        self._prefix_wait = PrefixWait(self.cache)
        self._num_reserved = 0  # places of sequences that come with their blocks
        self.num_preemptions = 0

    @property
    def max_num_seqs(self) -> int:
        return self._config.max_num_seqs

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def sequences(self) -> tuple[Sequence, ...]:
        """All sequences, running ones first."""
        return (*self._running, *self._waiting)

    def check(self, request: SequenceRequest) -> None:
        """Raises RequestError, with the numbers, for a request that can never run here."""
        prompt, outputs = len(request.prompt_ids), request.sampling.max_tokens
        if prompt < 1:
            raise RequestError("prompt of 0 tokens: must have at least 1")
        if prompt + outputs > self._config.max_model_len:
            raise RequestError(
                f"prompt of {prompt} tokens and max_tokens={outputs} make {prompt + outputs} "
                f"tokens, but the context holds {self._config.max_model_len}; "
                f"shorten the prompt or lower max_tokens"
            )
        if self._pool.blocks_for(request.max_computed_tokens) > self._pool.num_blocks:
            raise RequestError(
                f"prompt of {prompt} tokens and max_tokens={outputs} need "
                f"{request.max_computed_tokens} tokens of KV cache, but the whole cache holds "
                f"{self._pool.num_tokens}; lower max_tokens or serve with a larger KV cache"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises RequestError as `check` does."""
        self.check(sequence.request)
        sequence.arrival = next(self._arrivals)
        insort(self._waiting, sequence, key=_ORDER)

    @property
    def next_retry(self) -> float:
        """When the first of the blocked sequences is to be tried again; at the latest then there
        is something to schedule."""
        return min((each.retry_at for each in self.sequences()), default=0.0)

    def schedule(self, now: float = 0.0) -> tuple[Scheduled, ...]:
        """The next step: at most max_step_tokens, and never empty while there is work, unless
        what there is is blocked. now: in seconds of time.perf_counter."""
        config = self._config
        step = _Step(config.max_step_tokens, self._num_seats)
        for sequence in tuple(self._running):
            due = sequence.retry_at <= now
            if due and sequence.is_running and sequence.num_pending_tokens == 1:
                self._serve(sequence, step)
        behind = [each for each in self._running if each.num_pending_tokens > 1]
        prompts = [each for each in behind if each.retry_at <= now]
        for sequence in heapq.merge(prompts, self._candidates(step, now), key=_ORDER):
            if step.budget == 0:
                break
            if sequence.is_running:
                self._serve(sequence, step)
            elif step.seats > 0:
                self._admit(sequence, step)
        return tuple(Scheduled(sequence, count) for sequence, count in step.counts.items())

    def computed(self, scheduled: Scheduled) -> None:
        """The step has computed these tokens; called before the sequence takes another."""
        self.cache.computed(scheduled.sequence, scheduled.num_new_tokens)

    def remove(self, sequence: Sequence, *, reusable: bool = True) -> None:
        """Forget a sequence, wherever it is, and free its blocks. Unless they are `reusable`,
        nobody finds what they hold any more."""
        if sequence.is_running:
            if not reusable:
                self._pool.forget(sequence.block_table)
            self._stop(sequence)
        else:
            self._waiting.remove(sequence)
            self._prefix_wait.forget(sequence)

    def detach(self, sequence: Sequence) -> list[int]:
        """Forget a sequence; its blocks, if it has any, are the caller's to free."""
        blocks, sequence.block_table = sequence.block_table, []
        self.remove(sequence)
        return blocks

    def reserve(self, sequence: Sequence, num_tokens: int, found: list[int]) -> list[int]:
        """A place, and blocks for the first `num_tokens` of a sequence that is not here yet; the
        first of them are `found` in the cache. Raises UnavailableError where it cannot run now."""
        needed = self._pool.blocks_for(sequence.num_tokens) - len(found)
        spare = self._num_spare() - self._pool.num_cached_of(found)
        if self._num_seats < 1:
            raise UnavailableError(f"{self.max_num_seqs} sequences run here, and no more may")
        if needed > spare:
            raise UnavailableError(f"{needed} KV blocks are needed, {max(0, spare)} are to spare")
        self._num_reserved += 1
        self._pool.share(found)
        return [*found, *self._pool.allocate(self._pool.blocks_for(num_tokens) - len(found))]

    def give_back(self, blocks: list[int]) -> None:
        """What `reserve` gave is not needed."""
        self._num_reserved -= 1
        self._pool.free(blocks)

    def run_with(
        self, sequence: Sequence, blocks: list[int], num_tokens: int, num_found: int
    ) -> None:
        """Let a sequence run with what `reserve` gave, now that it holds `num_tokens`."""
        self._num_reserved -= 1
        sequence.arrival = next(self._arrivals)
        sequence.block_table = blocks
        sequence.num_computed_tokens = num_found * self._pool.block_size
        sequence.num_cached_tokens = sequence.num_computed_tokens
        sequence.is_running = True
        insort(self._running, sequence, key=_ORDER)
        self.cache.computed(sequence, num_tokens - sequence.num_computed_tokens)

    @property
    def _num_seats(self) -> int:
        return self._config.max_num_seqs - len(self._running) - self._num_reserved

    def _serve(self, sequence: Sequence, step: _Step) -> None:
        """Let a running sequence catch up as far as budget and blocks go."""
        wanted = min(sequence.num_pending_tokens, step.budget)
        room = self._make_room(sequence, wanted, step)
        count = min(sequence.num_pending_tokens, step.budget, room)
        if count > 0:
            step.counts[sequence] = count
            step.budget -= count

    def _make_room(self, sequence: Sequence, count: int, step: _Step) -> int:
        """Take blocks for `count` more tokens, or for as many as there are free ones; only where
        there would be no room at all is another preempted. Returns the tokens that have room."""
        room = self._room(sequence)
        if room >= count:
            return room
        while room == 0 and self._pool.num_free == 0 and self._preempt_last(sequence, step):
            pass
        missing = self._pool.blocks_for(count - room)
        sequence.block_table.extend(self._pool.allocate(min(missing, self._pool.num_free)))
        return self._room(sequence)

    def _room(self, sequence: Sequence) -> int:
        """Tokens that still fit into the sequence's blocks."""
        return len(sequence.block_table) * self._pool.block_size - sequence.num_computed_tokens

    def _preempt_last(self, sequence: Sequence, step: _Step) -> bool:
        """Preempt the last running sequence, unless that is `sequence` itself."""
        last = self._running[-1]
        if last is sequence:
            return False
        self._stop(last)
        last.num_computed_tokens = 0
        insort(self._waiting, last, key=_ORDER)
        step.budget += step.counts.pop(last, 0)
        step.seats = 0  # blocks are short: nobody is admitted to the step
        self.num_preemptions += 1
        return True

    def _candidates(self, step: _Step, now: float) -> Iterator[Sequence]:
        """The waiting sequences in order, for as long as the step has a seat for one."""
        for sequence in tuple(self._waiting):
            if step.seats < 1:
                return
            if sequence.retry_at <= now:
                yield sequence

    def _admit(self, sequence: Sequence, step: _Step) -> None:
        """Let a waiting sequence run and serve it, or hold it back and keep its seat. If its
        turn has come but not its blocks, nobody behind it gets a seat."""
        step.seats -= 1
        if self._prefix_wait.still_held(sequence):
            return
        found = self.cache.find(sequence)
        if self._prefix_wait.is_held(sequence, len(found), self._running):
            return
        needed = self._pool.blocks_for(sequence.num_tokens) - len(found)
        spare = self._num_spare() - self._pool.num_cached_of(found)
        if needed > spare:
            step.seats = 0
            return
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=_ORDER)
        sequence.is_running = True
        self.cache.reuse(sequence, found)
        self._serve(sequence, step)

    def _num_spare(self) -> int:
        """Free blocks beyond what running sequences need for their tokens and to grow a little."""
        needed = (len(self._running) + self._num_reserved) * self._config.growth_blocks
        for each in self._running:
            needed += self._pool.blocks_for(each.num_tokens) - len(each.block_table)
        return self._pool.num_free - needed

    def _stop(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        sequence.is_running = False
        self._pool.free(sequence.block_table)
        sequence.block_table = []
