"""Which versions of the protocol between its own processes this release speaks.

One number stands for all that processes tell each other: registration, exchange, hand-overs and the
streams of the engine. Knows no message; whoever opens a connection says its versions in the first
one, and the highest that both ends speak is used.

The rule, by which a cluster can be replaced process by process
(docs/decisions/0020-releases-side-by-side.md):
* A release speaks its own version and that of the release before it. Older ones are refused.
* What can be ignored without harm is added as a field, which an older process does not know, and
  whose absence a newer one takes for what it meant before. Everything else raises the number: a
  field that must not be ignored, a new value of an enum, another meaning.
"""

from collections.abc import Iterable

from moe_core.errors import ProtocolError

PROTOCOL_VERSION = 1
OLDEST_PROTOCOL = 1  # of the release before; the first release has none before it
PROTOCOL_VERSIONS = tuple(range(OLDEST_PROTOCOL, PROTOCOL_VERSION + 1))

# The first release said nothing when it registered.
UNSAID = (1,)


def common_version(whose: str, offered: Iterable[int], own_name: str) -> int:
    """The highest version that `whose` and this process, `own_name`, speak. Raises ProtocolError
    that names both sides' versions where there is none."""
    theirs = set(offered)
    common = theirs & set(PROTOCOL_VERSIONS)
    if not common:
        raise ProtocolError(
            f"no protocol version in common: {whose} speaks {sorted(theirs)}, "
            f"{own_name} speaks {list(PROTOCOL_VERSIONS)}; only releases next to each other work "
            "together"
        )
    return max(common)
