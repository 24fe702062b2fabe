"""KV blocks of sequences that have left, kept for the group that goes on with them.

Knows blocks and for how long they are kept. Knows no tokens and no peer.

Invariant: kept blocks hold what their sequence has computed, until `release` frees them and says
so. Whoever has read them before a release that says so has read the right thing.
"""

import asyncio
from collections.abc import Sequence as Many

import structlog

from attn_service.kv_blocks import BlockPool
from attn_service.sequence import Sequence
from moe_core.parked_kv import ParkedKv

log = structlog.get_logger(__name__)

KEEP_S = 15.0


class ParkedBlocks:
    def __init__(self, pool: BlockPool, keep_s: float = KEEP_S) -> None:
        self._pool = pool
        self._keep_s = keep_s
        self._parked: dict[str, tuple[list[int], asyncio.TimerHandle]] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    def park(self, sequence: Sequence, blocks: list[int]) -> ParkedKv:
        """Keep those of a sequence's blocks that hold what it has computed, and free the others.
        None is kept of one whose prompt's logprobs are still to be told: they are not in them."""
        sequence_id, num_tokens = sequence.request.sequence_id, sequence.num_computed_tokens
        num_kept = 0 if sequence.tells_prompt else self._pool.blocks_for(num_tokens)
        self._pool.free(blocks[num_kept:])
        if num_kept:
            self.keep(sequence_id, blocks[:num_kept])
        return ParkedKv(num_tokens, tuple(blocks[:num_kept]))

    def keep(self, sequence_id: str, blocks: Many[int]) -> None:
        """These taken blocks are this object's to free from now on."""
        self.release(sequence_id)
        loop = asyncio.get_running_loop()
        expiry = loop.call_later(self._keep_s, self._expire, sequence_id)
        self._parked[sequence_id] = [*blocks], expiry
        self._empty.clear()

    def release(self, sequence_id: str) -> bool:
        """Free a sequence's blocks; whether they were kept until now."""
        blocks, expiry = self._parked.pop(sequence_id, ((), None))
        if expiry is None:
            return False
        expiry.cancel()
        self._pool.free(blocks)
        if not self._parked:
            self._empty.set()
        return True

    def release_all(self) -> None:
        for sequence_id in tuple(self._parked):
            self.release(sequence_id)

    async def until_empty(self) -> None:
        """At the longest for as long as blocks are kept."""
        await self._empty.wait()

    def _expire(self, sequence_id: str) -> None:
        log.warning(
            "nobody has fetched a sequence's KV blocks",
            sequence_id=sequence_id,
            within_s=self._keep_s,
        )
        self.release(sequence_id)
