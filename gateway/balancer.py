"""Which DP group a request goes to.

Knows groups, their load and what was sent to them since they last reported it. Knows no stream
and no request beyond the KV blocks it may need.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gateway.groups import Group
from moe_core.cluster import AttentionLoad
from moe_core.errors import UnavailableError


@dataclass(slots=True)
class _Sent:
    load: AttentionLoad  # the report since which it was sent
    sequences: int = 0
    blocks: int = 0


class Balancer:
    """Spreads requests by free KV blocks and queue length.

    Reports come about once a second; between two of them a group counts as holding what was
    sent to it since the last, so that a burst does not all go to one group.
    """

    def __init__(self) -> None:
        self._sent: dict[int, _Sent] = {}

    def choose(self, groups: Iterable[Group], num_tokens: int, num_choices: int = 1) -> Group:
        """The group for a request of so many choices of `num_tokens` (prompt and output) each,
        which count as sent.

        Groups that can start it at once come first, and of those the emptiest; otherwise the
        one with the shortest queue. Only groups whose whole pool could hold it are considered;
        raises UnavailableError when there is none.
        """
        fitting = [group for group in groups if group.kv_tokens >= num_tokens]
        if not fitting:
            raise UnavailableError(f"no attention group's KV pool holds {num_tokens} tokens now")
        best = min(fitting, key=lambda group: self._cost(group, num_tokens, num_choices))
        sent = self._since_report(best)
        sent.sequences += num_choices
        sent.blocks += _blocks(best, num_tokens) * num_choices
        return best

    def _cost(
        self, group: Group, num_tokens: int, num_choices: int
    ) -> tuple[bool, int, float, int, int]:
        sent = self._since_report(group)
        free = group.load.free_kv_blocks - sent.blocks
        waits = group.load.num_waiting > 0 or free < _blocks(group, num_tokens) * num_choices
        queue = group.load.num_waiting + (sent.sequences if waits else 0)
        used_share = 1 - free / group.load.total_kv_blocks
        return waits, queue, used_share, group.load.num_running + sent.sequences, group.dp_rank

    def _since_report(self, group: Group) -> _Sent:
        sent = self._sent.get(group.dp_rank)
        if sent is None or sent.load is not group.load:
            sent = self._sent[group.dp_rank] = _Sent(group.load)
        return sent


def _blocks(group: Group, num_tokens: int) -> int:
    return -(-num_tokens // group.load.kv_block_size)
