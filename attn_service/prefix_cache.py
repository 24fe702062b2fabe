"""Which tokens' keys and values are in the cache already.

Knows how blocks are named by their tokens, and the block pool. Knows no order of service.

A full block's keys and values depend on its tokens and on all tokens before them, so its key is
a chain: key(i) = H(key(i-1), tokens of block i). H is BLAKE2b with 256 bits: two different
prefixes with one key would take 2^128 trials to find on purpose, so tokens are not compared.

Invariants:
* A block is registered only after a step has computed the last of its tokens, so what is found
  has been computed.
* A sequence's last token is never taken from the cache, since its logits are needed. So a
  sequence writes only behind the full blocks that it shares: nobody writes to a shared block.
"""

import hashlib
from array import array

from attn_service.kv_blocks import BlockPool
from attn_service.sequence import Sequence

KEY_BYTES = 32


class PrefixCache:
    """Also counts, over all sequences: tokens that were looked for, and those that were found."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.num_query_tokens = 0
        self.num_hit_tokens = 0

    @property
    def block_size(self) -> int:
        return self._pool.block_size

    def find(self, sequence: Sequence) -> list[int]:
        """The blocks that hold the sequence's first tokens, as many as there are in a row."""
        blocks: list[int] = []
        for key in self.wanted_keys(sequence):
            block = self._pool.find(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def reuse(self, sequence: Sequence, blocks: list[int]) -> None:
        """Begin `sequence`, which has no blocks, with those that `find` gave."""
        self._pool.share(blocks)
        sequence.block_table = list(blocks)
        sequence.num_computed_tokens = len(blocks) * self.block_size
        if sequence.num_cached_tokens is None:  # not when it comes back from a preemption
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.num_query_tokens += sequence.num_tokens
            self.num_hit_tokens += sequence.num_computed_tokens

    def computed(self, sequence: Sequence, num_tokens: int) -> None:
        """`num_tokens` more tokens of `sequence` are in its blocks: full ones can be found."""
        first = sequence.num_computed_tokens // self.block_size
        sequence.num_computed_tokens += num_tokens
        end = sequence.num_computed_tokens // self.block_size
        if first == end:
            return
        keys = self.keys(sequence)
        for index in range(first, end):
            self._pool.register(sequence.block_table[index], keys[index])

    def wanted_keys(self, sequence: Sequence) -> list[bytes]:
        """The keys of the blocks that `sequence` could take from the cache. One that is to tell its
        prompt's logprobs takes none: the cache knows no logits."""
        if sequence.tells_prompt:
            return []
        return self.keys(sequence)[: (sequence.num_tokens - 1) // self.block_size]

    def keys(self, sequence: Sequence) -> list[bytes]:
        """The key of every block that the sequence's tokens fill, computed or not."""
        size, keys = self.block_size, sequence.block_keys
        for start in range(len(keys) * size, sequence.num_tokens - size + 1, size):
            parent = keys[-1] if keys else bytes(KEY_BYTES)
            tokens = array("I", sequence.token_ids[start : start + size]).tobytes()
            keys.append(hashlib.blake2b(parent + tokens, digest_size=KEY_BYTES).digest())
        return keys
