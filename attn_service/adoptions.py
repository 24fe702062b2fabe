"""Sequences that another group has parked, on their way into this one with their KV blocks.

Knows which blocks are reserved for whom, and when a sequence computes its tokens again instead.
Knows no peer and no bytes: a KvFetcher fills blocks.

One after the other, so that a sequence finds in the cache what the one before it brought: the
choices of a request share its prompt. A sequence belongs to this object from `begin` until it is
given to the scheduler (running, with its blocks, or waiting, with none) or let go of; so do the
blocks that are reserved for it, which nobody else is given before nothing can write to them.
"""

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Protocol

import structlog

from attn_service.kv_blocks import BlockPool
from attn_service.scheduler import Scheduler
from attn_service.sequence import Sequence
from moe_core.errors import EpserveError, UnavailableError
from moe_core.parked_kv import KvSource

log = structlog.get_logger(__name__)

ADOPT_S = 10.0  # from its coming; the other group keeps the blocks for longer (parked.py)


class StillWritingError(UnavailableError):
    """Blocks were not filled, and a rank of this group, which does not answer, may write to them
    yet. It is lost, and the group with it."""


class KvFetcher(Protocol):
    async def fetch(
        self, sequence_id: str, source: KvSource, first: int, blocks: Many[int], timeout_s: float
    ) -> None:
        """Fill `blocks` with those of `source` from its block `first` on, which is told then that
        nobody wants them any more. Raises EpserveError where they are not filled, or were not kept
        until then. But for StillWritingError, nothing is written to `blocks` after this."""

    async def release(self, sequence_id: str, source: KvSource) -> None:
        """The blocks of `source` are not wanted any more. Raises EpserveError."""


class Adoptions:
    """fetcher None: every sequence is computed again. changed: called when the scheduler has more
    to do."""

    def __init__(
        self,
        scheduler: Scheduler,
        pool: BlockPool,
        fetcher: KvFetcher | None,
        changed: Callable[[], None],
    ) -> None:
        self._scheduler = scheduler
        self._pool = pool
        self._fetcher = fetcher
        self._changed = changed
        self._coming: dict[Sequence, float] = {}  # each with its deadline, in the order of arrival
        self._work: asyncio.Task[None] | None = None
        self._error: Exception | None = None
        self.handed_over_tokens = 0
        self.recomputed_tokens = 0

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return tuple(self._coming)

    @property
    def holds_blocks(self) -> bool:
        """Whether blocks may be reserved that come free, or run, without a step."""
        return self._work is not None

    def begin(self, sequence: Sequence) -> None:
        """Raises RequestError as `Scheduler.check` does."""
        self._scheduler.check(sequence.request)
        loop = asyncio.get_running_loop()
        self._coming[sequence] = loop.time() + ADOPT_S
        if self._work is None:
            self._work = loop.create_task(self._adopt_all(), name="adopt sequences")

    def cancel(self, sequence: Sequence) -> bool:
        """Let go of a sequence; False where it is not on its way any more."""
        return self._coming.pop(sequence, None) is not None

    def check(self) -> None:
        """Raises what has ended the work here: a lost rank, or an error in the program."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """The engine has ended, and with it all that could be on its way."""
        if self._work is not None:
            self._work.cancel()
        self._coming.clear()

    async def _adopt_all(self) -> None:
        try:
            while self._coming:
                await self._adopt(next(iter(self._coming)))
        except Exception as error:
            self._error = error
        finally:
            self._work = None
            self._changed()

    async def _adopt(self, sequence: Sequence) -> None:
        source = sequence.request.kv_source
        assert source is not None
        num_tokens = min(source.parked.num_tokens, sequence.num_tokens - 1)
        found = self._scheduler.cache.find(sequence)
        num_found = len(found) * self._pool.block_size
        if num_found >= num_tokens:
            self._give_to_scheduler(sequence)
            await self._release(sequence, source)
            return
        try:
            fetcher, timeout_s = self._check(sequence, source, num_tokens)
            blocks = self._scheduler.reserve(sequence, num_tokens, found)
        except UnavailableError as refusal:
            self._recompute(sequence, num_tokens - num_found, refusal)
            await self._release(sequence, source)
            return
        try:
            await fetcher.fetch(
                sequence.request.sequence_id, source, len(found), blocks[len(found) :], timeout_s
            )
        except StillWritingError:
            raise  # with the blocks: nobody else may have them
        except EpserveError as error:
            self._scheduler.give_back(blocks)
            self._recompute(sequence, num_tokens - num_found, error)
        except BaseException:
            self._scheduler.give_back(blocks)
            raise
        else:
            self._go_on(sequence, blocks, num_tokens, len(found))

    def _go_on(
        self, sequence: Sequence, blocks: list[int], num_tokens: int, num_found: int
    ) -> None:
        """With `num_tokens` in `blocks`, of which the first `num_found` were here already."""
        if not self.cancel(sequence):
            self._scheduler.give_back(blocks)
            return
        self._scheduler.run_with(sequence, blocks, num_tokens, num_found)
        brought = num_tokens - num_found * self._pool.block_size
        self.handed_over_tokens += brought
        log.info(
            "KV blocks were handed over",
            sequence_id=sequence.request.sequence_id,
            tokens=brought,
            blocks=len(blocks) - num_found,
        )

    def _recompute(self, sequence: Sequence, num_tokens: int, reason: EpserveError) -> None:
        log.warning(
            "KV blocks were not handed over: the tokens are computed again",
            sequence_id=sequence.request.sequence_id,
            tokens=num_tokens,
            reason=str(reason),
        )
        self.recomputed_tokens += num_tokens
        self._give_to_scheduler(sequence)

    def _give_to_scheduler(self, sequence: Sequence) -> None:
        """To wait like any other, if it is still wanted."""
        if self.cancel(sequence):
            self._scheduler.add(sequence)

    def _check(
        self, sequence: Sequence, source: KvSource, num_tokens: int
    ) -> tuple[KvFetcher, float]:
        if self._fetcher is None:
            raise UnavailableError("this process fetches no KV blocks")
        if not source.parked.block_ids:
            raise UnavailableError("the other group has kept none")
        if len(source.parked.block_ids) < self._pool.blocks_for(num_tokens):
            raise UnavailableError(
                f"{num_tokens} tokens need {self._pool.blocks_for(num_tokens)} blocks of "
                f"{self._pool.block_size}, and {len(source.parked.block_ids)} are named"
            )
        timeout_s = self._coming[sequence] - asyncio.get_running_loop().time()
        if timeout_s <= 0:
            raise UnavailableError(f"it was not its turn within {ADOPT_S:g} s")
        return self._fetcher, timeout_s

    async def _release(self, sequence: Sequence, source: KvSource) -> None:
        """So that the other group need not wait for its deadline."""
        self._changed()
        if self._fetcher is None or not source.parked.block_ids:
            return
        try:
            await self._fetcher.release(sequence.request.sequence_id, source)
        except EpserveError as error:
            log.info("a group was not told that it may free KV blocks", reason=str(error))
