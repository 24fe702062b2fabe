"""Which KV blocks are free and which are taken.

Knows block ids and counts only; the cache's tensors and who owns a block are elsewhere.

Invariant: every block is either free or taken by exactly one `allocate`, so
`num_free + taken == num_blocks` always, and giving back a free block is an error.
"""

from collections.abc import Sequence

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
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = [True] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_tokens(self) -> int:
        """Tokens that the whole cache holds."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens of one sequence fill or begin."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> tuple[int, ...]:
        """`count` block ids. Raises ValueError if fewer are free."""
        if count > len(self._free):
            raise ValueError(f"{count} KV blocks wanted, {len(self._free)} free")
        taken = tuple(self._free.pop() for _ in range(count))
        for block in taken:
            self._is_free[block] = False
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        """Give blocks back. Raises ValueError for one that is not taken."""
        for block in reversed(blocks):
            if self._is_free[block]:
                raise ValueError(f"KV block {block} is freed but was not taken")
            self._is_free[block] = True
            self._free.append(block)
