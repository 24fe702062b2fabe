"""One EP group's share of a layer on its way, and who has it instead where that goes wrong.

Knows what was sent to the group's processes and what has become of it. Knows no placement and
nothing of who else could compute it; failover.py does.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_service.dispatch_plan import GroupDispatch
from moe_core.errors import TransportError
from moe_core.transport.base import Combine, Dispatch, ExpertLink, PendingCombine


@dataclass(slots=True)
class Part:
    """One process of the group: the answer to come once it is on its way, then what it said."""

    link: ExpertLink
    answer: PendingCombine | None = None
    combine: Combine | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """rows: [n] int64 of the layer's. partials: [n, hidden_size] of each process of the group."""

    rows: Tensor
    partials: tuple[Tensor, ...]


@dataclass(eq=False, slots=True)
class Send:
    """A dispatch to all processes of one EP group; its TP shards all get the same rows.

    sent_at, late_at: in the loop's time; others are asked too then. instead_of: whose substitute
    it is. error: what one of the processes has met; then the partials of all are worth nothing.
    substitutes: who was asked instead or as well, for all rows of `rest` but `uncovered` (positions
    in it, int64). kept, not_kept: what was answered of a dispatch in chunks before it failed, and
    what is left of `group`.
    """

    group: GroupDispatch
    dispatch: Dispatch
    parts: tuple[Part, ...]
    sent_at: float
    late_at: float
    instead_of: "Send | None" = None
    error: TransportError | None = None
    substitutes: list["Send"] | None = None
    uncovered: Tensor | None = None
    kept: Kept | None = None
    not_kept: GroupDispatch | None = None

    @property
    def rest(self) -> GroupDispatch:
        """What others have to compute where this one has failed or is late."""
        return self.not_kept or self.group

    @property
    def ep_rank(self) -> int:
        return self.group.ep_rank

    @property
    def tried(self) -> set[int]:
        """Groups that have been asked for these rows: this one and those that it stands in for."""
        return {self.ep_rank} | (self.instead_of.tried if self.instead_of else set())

    @property
    def answered(self) -> bool:
        return self.error is None and all(part.combine is not None for part in self.parts)

    @property
    def outstanding(self) -> bool:
        return self.error is None and not self.answered

    @property
    def replaced(self) -> bool:
        """All its rows are answered by substitutes."""
        if self.substitutes is None or (self.uncovered is not None and self.uncovered.numel()):
            return False
        return all(each.answered or each.replaced for each in self.substitutes)

    @property
    def complete(self) -> bool:
        """Nothing more is to be waited for: each row has its partials or will not have them."""
        if self.answered or self.replaced:
            return True
        if self.error is None or self.substitutes is None:
            return False
        return all(each.complete for each in self.substitutes)

    def all(self) -> Iterator["Send"]:
        """This one and all that were sent for it."""
        yield self
        for each in self.substitutes or ():
            yield from each.all()

    def unfinished(self) -> Iterator["Send"]:
        """The same, without those of which nothing more is needed."""
        if not self.complete:
            yield self
            for each in self.substitutes or ():
                yield from each.unfinished()

    def counted(self) -> Iterator["Send"]:
        """Once `complete`: those whose partials make up the sum, each row's once."""
        if self.answered or self.kept is not None:
            yield self
        if not self.answered:
            for each in self.substitutes or ():
                yield from each.counted()

    def abandoned(self) -> Iterator["Send"]:
        """Once `complete`: those of whose rows some have no partials."""
        if self.answered:
            return
        if self.error is not None and self.uncovered is not None and self.uncovered.numel():
            yield self
        for each in self.substitutes or ():
            yield from each.abandoned()

    def look(self) -> None:
        """Take what has been answered by now."""
        for part in self.parts:
            if self.error is None and part.combine is None and part.answer and part.answer.done:
                self.take(part)

    def take(self, part: Part) -> None:
        """`part` is done."""
        assert part.answer is not None
        try:
            part.combine = part.answer.result()
        except TransportError as error:
            self.error = error

    async def receive(self) -> bool:
        """Whether all answers are there before it is late."""
        loop = asyncio.get_running_loop()
        for part in self.parts:
            if part.answer is None:
                return False
            started = time.perf_counter()
            if await part.answer.settled(max(0.0, self.late_at - loop.time())):
                self.take(part)
            # Answers are awaited one after the other, so no second counts twice.
            part.link.counters.wait_s += time.perf_counter() - started
            if part.combine is None:
                return False
        return True

    async def expire(self) -> None:
        """The layer has no more time: fail with the name of who has not answered."""
        for part in self.parts:
            if self.error is None and part.combine is None and part.answer is not None:
                try:
                    part.combine = await part.answer.wait(0.0)
                except TransportError as error:
                    self.error = error

    def keep_answered(self) -> None:
        """It has failed: what all its processes had answered by then counts all the same."""
        answered = torch.ones(self.dispatch.num_tokens, dtype=torch.bool)
        partials = []
        for part in self.parts:
            rows, partial = _answered_rows(part)
            if partial is None:
                return
            mask = torch.zeros_like(answered)
            for each in rows:
                mask[each] = True
            answered &= mask
            partials.append(partial)
        positions = answered.nonzero()[:, 0]
        if partials and positions.numel():
            positions = positions.to(self.group.physical_ids.device)
            rows_kept = self.group.only(positions).rows
            assert rows_kept is not None
            self.kept = Kept(rows_kept, tuple(each[positions] for each in partials))
            self.not_kept = self.group.only((~answered).nonzero()[:, 0].to(positions.device))

    def partials(self) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Of one that is counted: rows [n] int64 (None: all), and each process's partials."""
        if self.kept is not None:
            return self.kept.rows, self.kept.partials
        combines = [part.combine for part in self.parts]
        return self.group.rows, tuple(each.partial for each in combines if each is not None)

    @property
    def awaited(self) -> list[PendingCombine]:
        """Answers that have not been taken."""
        return [part.answer for part in self.parts if part.answer and part.combine is None]

    @property
    def owed(self) -> list[PendingCombine]:
        """Answers that have not come, wanted or not."""
        return [part.answer for part in self.parts if part.answer and part.answer.owed]

    def release(self) -> None:
        """Nothing of it is wanted any more."""
        for part in self.parts:
            if part.answer is not None:
                part.answer.release()


def _answered_rows(part: Part) -> tuple[tuple[slice, ...], Tensor | None]:
    if part.combine is not None:
        return (slice(None),), part.combine.partial
    chunks = None if part.answer is None else part.answer.answered_chunks()
    return ((), None) if chunks is None else chunks


async def all_ended(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Until all have ended; raises what the first of them (by rank) raised. A cancelled caller
    leaves none of them running."""
    try:
        await asyncio.wait(tasks)
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        raise
    failures = [error for error in (task.exception() for task in tasks) if error is not None]
    if failures:
        raise failures[0]
