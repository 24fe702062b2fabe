"""Which KV blocks are free, who shares which, and which still hold something worth finding.

Knows block ids, counts of users and the keys under which full blocks can be found again. Knows
neither tokens nor what a key means; prefix_cache.py does.

Invariants:
* A block is *taken* by one or more users, or *cached* (no user, but found by its key), or
  *blank*. The last two are free: `num_free + taken == num_blocks` always.
* A key names at most one block and a block has at most one key, from `register` until the block
  is handed out again or `forget` is called. So what `find` gives has not been given away since.
* Cached blocks are handed out only when no blank one is left, the longest unused first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from moe_core.errors import ConfigError


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if block_size < 1:
            raise ConfigError("block_size", block_size, "a KV block holds at least 1 token", (16,))
        if num_blocks < 1:
            raise ConfigError("num_blocks", num_blocks, "a KV cache needs at least 1 block", (1,))
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Taken from the end: low ids come first, and what was freed last is used first.
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self._num_users = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out: blank ones, and cached ones that it would evict."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_tokens(self) -> int:
        """Tokens that the whole cache holds."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens of one sequence fill or begin."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> tuple[int, ...]:
        """`count` block ids with one user each. Raises ValueError if fewer are free."""
        if count > self.num_free:
            raise ValueError(f"{count} KV blocks wanted, {self.num_free} free")
        return tuple(self._take() for _ in range(count))

    def find(self, key: bytes) -> int | None:
        """The block registered under `key`, taken or cached."""
        return self._block_of.get(key)

    def share(self, blocks: Iterable[int]) -> None:
        """One more user for each of these. Raises ValueError for a blank block."""
        for block in blocks:
            if self._num_users[block] == 0 and block not in self._cached:
                raise ValueError(f"KV block {block} is shared but holds nothing")
            self._cached.pop(block, None)
            self._num_users[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """One user less for each. A block's followers lose their worth with it, so the last is
        evicted first. Raises ValueError for a block that has no user."""
        for block in reversed(blocks):
            if self._num_users[block] == 0:
                raise ValueError(f"KV block {block} is freed but was not taken")
            self._num_users[block] -= 1
            if self._num_users[block] == 0:
                self._release(block)

    def register(self, block: int, key: bytes) -> None:
        """Let a taken block be found. Where another block holds the same, that one stays the one
        that is found. Raises ValueError for a free block or one that has another key."""
        if self._num_users[block] == 0 or self._key_of.get(block, key) != key:
            raise ValueError(f"KV block {block} is registered, but is free or has another key")
        if self._block_of.setdefault(key, block) == block:
            self._key_of[block] = key

    def forget(self, blocks: Iterable[int]) -> None:
        """What these taken blocks hold is not to be found again. Raises ValueError for a free
        block."""
        for block in blocks:
            if self._num_users[block] == 0:
                raise ValueError(f"KV block {block} is forgotten but was not taken")
            self._drop_key(block)

    def num_cached_of(self, blocks: Iterable[int]) -> int:
        """How many of these are cached, so that sharing them would make fewer free."""
        return sum(block in self._cached for block in blocks)

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._drop_key(block)
        self._num_users[block] = 1
        return block

    def _release(self, block: int) -> None:
        if block in self._key_of:
            self._cached[block] = None
        else:
            self._blank.append(block)

    def _drop_key(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
