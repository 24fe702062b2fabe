"""Names and phrases in a message: the first few, and how many more there are.

Knows text only.
"""

from collections.abc import Sequence

MOST_NAMED = 6


def listed(names: Sequence[str], separator: str = ", ", most: int = MOST_NAMED) -> str:
    """All of `names` where there are few, else the first `most` and the number of the others."""
    more = len(names) - most
    return separator.join([*names[:most], *([f"{more} more"] if more > 0 else [])])
