"""How fast a cluster's totals grow: the difference of two of its states.

Knows totals and time. Where a process has been replaced in between, its totals have started anew,
and there is no rate yet.
"""

from dataclasses import dataclass

from moe_core.cluster import ClusterState, LinkStats, Member


@dataclass(frozen=True, slots=True)
class LinkRate:
    """Per second; bytes in both directions, tokens to the expert process, in every layer."""

    link: LinkStats
    bytes_per_s: float
    dispatches_per_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class EngineRate:
    """step_s: mean seconds of the steps between; None where there was none."""

    tokens_per_s: float
    step_s: float | None


class ClusterRates:
    """`after` was taken `seconds` after `before`."""

    def __init__(self, before: ClusterState, after: ClusterState, seconds: float) -> None:
        self._before = {member.instance_epoch: member for member in before.members}
        self._after = after
        self._seconds = max(seconds, 1e-3)

    def links(self) -> list[LinkRate]:
        """Of all links that were there before, the busiest first."""
        rates = [rate for member in self._after.members for rate in self._of_member(member)]
        return sorted(rates, key=lambda rate: -rate.bytes_per_s)

    def engine(self, member: Member) -> EngineRate | None:
        """Of an attention group's leader; None without two reports of it."""
        before = self._before.get(member.instance_epoch)
        old = None if before is None else before.engine_metrics
        new = member.engine_metrics
        if old is None or new is None:
            return None
        steps = new.steps - old.steps
        return EngineRate(
            tokens_per_s=(new.output_tokens - old.output_tokens) / self._seconds,
            step_s=(new.step_s - old.step_s) / steps if steps > 0 else None,
        )

    def _of_member(self, member: Member) -> list[LinkRate]:
        before = self._before.get(member.instance_epoch)
        old = {link.target: link for link in before.links} if before is not None else {}
        return [
            self._of_link(old[link.target], link) for link in member.links if link.target in old
        ]

    def _of_link(self, old: LinkStats, new: LinkStats) -> LinkRate:
        moved = new.dispatch_bytes + new.combine_bytes - old.dispatch_bytes - old.combine_bytes
        dispatches = new.dispatches - old.dispatches
        tokens = new.dispatch_tokens - old.dispatch_tokens
        return LinkRate(new, *(max(0, n) / self._seconds for n in (moved, dispatches, tokens)))
