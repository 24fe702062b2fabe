"""The expert processes as this process has met them: links by rank, and how their EP groups stand.

Knows links, and what dispatches have lately told of the groups: lost, failing, late, busy. Knows
no placement and no layer.

A group is as good as its worst process, since a token's partials from it are of use only all
together. It is DOWN while a process of it has no link that works; AVOIDED while a dispatch from
which something was hedged away is still out, and for a while after that or after it failed
something; BUSY while dispatches queue there for much longer than elsewhere.
"""

from collections.abc import Iterable, Mapping, Sequence

from attn_service.replica_choice import ALL_USUAL, AVOIDED, BUSY, DOWN, USUAL, Standing
from moe_core.transport.base import ExpertLink, PendingCombine

REVIEW_S = 0.5
AVOID_FAILED_S = 1.0
# A late group is tried again after so many times its lateness, so that trying costs little.
AVOID_LATE_TIMES = 10.0
AVOID_LATE_MAX_S = 5.0
# Queues of less than this differ by chance.
BUSY_QUEUE_US = 1000.0
BUSY_TIMES = 2.0
NEWEST_WEIGHT = 0.2  # of one answer in a group's mean


class Peers:
    """links: of ranks 0, 1, …, where they are there already."""

    def __init__(self, etp_size: int, links: Iterable[ExpertLink] = ()) -> None:
        self._etp_size = etp_size
        self._links = dict(enumerate(links))
        self._absent: Mapping[int, str] = {}
        self._groups: dict[int, tuple[ExpertLink, ...]] = {}
        self._late: list[tuple[int, float, PendingCombine]] = []
        self._avoided_until: dict[int, float] = {}
        self._queue_us: dict[int, float] = {}
        self._standing: Standing = ALL_USUAL
        self._ep_size = 0  # that `_standing` is of
        self._review_at = 0.0

    @property
    def links(self) -> Mapping[int, ExpertLink]:
        """By rank, lost ones included."""
        return self._links

    def put(self, rank: int, link: ExpertLink) -> ExpertLink | None:
        """Use `link` from now on; the link that it replaces, if there was one."""
        old = self._links.get(rank)
        self._links[rank] = link
        group = rank // self._etp_size
        self._avoided_until.pop(group, None)
        self._queue_us.pop(group, None)
        self._changed()
        return old

    def drop(self, rank: int) -> ExpertLink | None:
        """Nothing is placed on that process any more."""
        self._changed()
        return self._links.pop(rank, None)

    def lose(self, rank: int, reason: str) -> None:
        """That process counts as gone; what is under way there fails at once."""
        self._links[rank].lose(reason)
        self._changed()

    def explain_absent(self, reasons: Mapping[int, str]) -> None:
        """Why ranks have no link, for who asks."""
        self._absent = reasons

    def group(self, ep_rank: int) -> tuple[ExpertLink, ...]:
        """The links to all processes of a group; none where one of them cannot be used."""
        links = self._groups.get(ep_rank)
        if links is None:
            found = [self._links.get(rank) for rank in self._ranks(ep_rank)]
            able = tuple(each for each in found if each and each.lost_because is None)
            links = self._groups[ep_rank] = able if len(able) == self._etp_size else ()
        return links

    def why_down(self, ep_rank: int) -> str:
        """Which processes of a group cannot be used, and why."""
        reasons = []
        for rank in self._ranks(ep_rank):
            link = self._links.get(rank)
            if link is None:
                reasons.append(f"expert {rank} ({self._absent.get(rank, 'not connected')})")
            elif link.lost_because is not None:
                reasons.append(f"{link.peer}, which is gone: {link.lost_because}")
        return " and ".join(reasons) or f"expert {self._ranks(ep_rank)[0]}"

    def standing(self, ep_size: int, now: float) -> Standing:
        """Of groups 0 to ep_size - 1, at `now` of the loop's time. Quick while nothing comes up."""
        if self._late:
            self._look_at_late(now)
        if now >= self._review_at or ep_size != self._ep_size:
            self._review(ep_size, now)
        return self._standing

    def answered(self, ep_rank: int, queue_us: int) -> None:
        """How long a dispatch has queued there."""
        mean = self._queue_us.get(ep_rank, 0.0)
        self._queue_us[ep_rank] = mean + NEWEST_WEIGHT * (queue_us - mean)

    def failed(self, ep_rank: int, now: float) -> None:
        """A dispatch has failed there; whether a link was lost is looked up."""
        self._avoided_until[ep_rank] = now + AVOID_FAILED_S
        self._changed()

    def late(self, ep_rank: int, answers: Sequence[PendingCombine], since: float) -> None:
        """Others are asked for what these, sent at `since`, were to answer."""
        self._late += ((ep_rank, since, answer) for answer in answers)
        self._changed()

    def _look_at_late(self, now: float) -> None:
        """Note what has been answered after all."""
        kept = []
        for ep_rank, since, answer in self._late:
            if answer.owed:
                kept.append((ep_rank, since, answer))
                continue
            for_s = min(AVOID_LATE_MAX_S, AVOID_LATE_TIMES * (now - since))
            self._avoided_until[ep_rank] = now + for_s
            self._changed()
        self._late = kept

    def _review(self, ep_size: int, now: float) -> None:
        self._groups.clear()
        queues = [self._queue_us.get(rank, 0.0) for rank in range(ep_size)]
        limit = max(BUSY_TIMES * min(queues), min(queues) + BUSY_QUEUE_US)
        late = {ep_rank for ep_rank, _, _ in self._late}
        stands = []
        for rank, queue in enumerate(queues):
            if not self.group(rank):
                stands.append(DOWN)
            elif rank in late or self._avoided_until.get(rank, now) > now:
                stands.append(AVOIDED)
            else:
                stands.append(BUSY if queue > limit else USUAL)
        usual = all(stand == USUAL for stand in stands)
        self._standing = ALL_USUAL if usual else tuple(stands)
        self._ep_size = ep_size
        ends = [until for until in self._avoided_until.values() if until > now]
        self._review_at = min([now + REVIEW_S, *ends])

    def _changed(self) -> None:
        self._groups.clear()
        self._review_at = 0.0

    def _ranks(self, ep_rank: int) -> range:
        return range(ep_rank * self._etp_size, (ep_rank + 1) * self._etp_size)
