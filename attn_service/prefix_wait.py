"""Which waiting sequences had better wait for a prompt that is being computed.

Knows what running sequences have computed and what others share with it. Knows no budget and no
free blocks.

Several requests that begin alike often come at once: the choices of one request, or a system
prompt with many users. Were all admitted, each would compute the same prompt. So a waiting
sequence is held back while a running one that is served before it has yet to compute a block
that both begin with and that the cache does not hold.

That ends: the other is running and served first, so it gets on with its prompt no later than the
one held back would, and when it has computed what they share, or is preempted, or has ended,
or is blocked for want of an expert, nothing is held back for it any more. And it idles nothing: a
running sequence has work to do.
"""

from collections.abc import Iterable

from attn_service.prefix_cache import PrefixCache
from attn_service.sequence import Sequence


class PrefixWait:
    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        # Whom a sequence is held back for, and how many tokens that one must have computed.
        self._held: dict[Sequence, tuple[Sequence, int]] = {}

    def is_held(self, sequence: Sequence, found: int, running: Iterable[Sequence]) -> bool:
        """Whether `sequence`, of which `found` blocks are in the cache, is held back from now on.

        running: in order of service.
        """
        keys = self._cache.wanted_keys(sequence)
        for other in running if found < len(keys) else ():
            if other.order > sequence.order:
                break
            if _gets_on(other) and self._will_compute(other, found, keys[found]):
                shared = _num_alike(keys, other.block_keys)
                self._held[sequence] = other, shared * self._cache.block_size
                return True
        return False

    def still_held(self, sequence: Sequence) -> bool:
        """Whether what `sequence` was held back for is still to come; quick."""
        other, num_tokens = self._held.get(sequence, (None, 0))
        if other is not None and _gets_on(other) and other.num_computed_tokens < num_tokens:
            return True
        self.forget(sequence)
        return False

    def forget(self, sequence: Sequence) -> None:
        """Nobody asks about `sequence` any more."""
        self._held.pop(sequence, None)

    def _will_compute(self, other: Sequence, index: int, key: bytes) -> bool:
        """Whether block `index` of `other` will hold what `key` stands for, but does not yet."""
        keys = other.block_keys
        uncomputed = other.num_computed_tokens < (index + 1) * self._cache.block_size
        return uncomputed and index < len(keys) and keys[index] == key


def _gets_on(sequence: Sequence) -> bool:
    return sequence.is_running and sequence.blocked_since is None


def _num_alike(keys: list[bytes], others: list[bytes]) -> int:
    """How many keys the two begin with alike; a key stands for all before it, too."""
    limit = min(len(keys), len(others))
    return next((i for i in range(limit) if keys[i] != others[i]), limit)
