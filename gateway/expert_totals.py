"""Which experts the whole cluster's tokens went to: the sum of what the attention groups report.

Knows reports and when they are new. Knows no placement and no HTTP.
"""

from itertools import repeat

from moe_core.cluster import ClusterState, ExpertLoad, Role


class ExpertTotals:
    """`version` grows whenever the sum, or who is in it, has changed."""

    def __init__(self) -> None:
        self.version = 0
        self._reports: dict[int, ExpertLoad] = {}
        self._tokens: list[list[int]] = []

    def update(self, state: ClusterState) -> None:
        """Take in what has been reported since; costs nothing where nothing has."""
        reports = {
            member.instance_epoch: member.expert_load
            for member in state.tier(Role.ATTN)
            if member.expert_load is not None
        }
        same_sources = reports.keys() == self._reports.keys()
        before = self._reports if same_sources else {}
        changed = [epoch for epoch in reports if reports[epoch] is not before.get(epoch)]
        if same_sources and not changed:
            return
        if not same_sources:
            self._tokens = []
        for epoch in changed:
            self._replace(before.get(epoch), reports[epoch])
        self._reports = reports
        self.version += 1

    @property
    def sources(self) -> tuple[int, ...]:
        """The instance epochs of the processes whose tokens the sum counts; it can be compared
        with another of the same sources only."""
        return tuple(sorted(self._reports))

    @property
    def load(self) -> ExpertLoad | None:
        """The sum; None before the first report."""
        report = next(iter(self._reports.values()), None)
        if report is None:
            return None
        return ExpertLoad(report.layer_ids, tuple(map(tuple, self._tokens)))

    def _replace(self, old: ExpertLoad | None, new: ExpertLoad) -> None:
        """All reports have the same shape: the registry has seen to it."""
        totals = self._tokens or [[0] * len(row) for row in new.tokens]
        befores = old.tokens if old else repeat((0,) * len(totals[0]) if totals else ())
        self._tokens = [
            [total + now - then for total, now, then in zip(row, nows, thens, strict=True)]
            for row, nows, thens in zip(totals, new.tokens, befores, strict=False)
        ]
