"""One layer's exchange with the expert tier, brought to an end whoever fails or is late.

Knows one layer's tables, the groups that are asked, and who is asked instead or as well. Knows
neither who sums nor what becomes of rows that nobody can compute.

Where a process is lost or fails a dispatch, its group's partials for that dispatch are void, and
what the group was to compute, and nothing else, goes to the groups that hold copies (of a dispatch
in chunks, what had not been answered). Where a group
is late and others hold all that was asked of it, they are asked as well, and whichever set is
complete first counts; the other's answers are dropped.

Why this ends: what is sent again never goes to a group that it has been sent to before, and the
layer has a deadline.
"""

import asyncio
from collections.abc import Callable, Sequence

from torch import Tensor

from attn_service import exchange_words
from attn_service.dispatch_plan import GroupDispatch, plan_again
from attn_service.experts import LostRows
from attn_service.peers import Peers
from attn_service.replica_choice import AVOIDED, DOWN, USUAL, LayerTables, Standing
from attn_service.sends import Part, Send, all_ended
from moe_core.errors import PeerLostError, PeerTimeoutError, TransportError
from moe_core.exchange import SLOT_TOKENS
from moe_core.placement import LayerPlacement
from moe_core.transport.base import Dispatch, DispatchKey


class LayerExchange:
    """key: of the first attempt. hidden: [n, hidden_size]; weights: [n, num_columns]. tables: of
    the layer, by how the groups stand. patience_s: when a group is late. deadline: of the whole
    layer, in the loop's time."""

    def __init__(
        self,
        peers: Peers,
        layer: LayerPlacement,
        tables: Callable[[Standing], LayerTables],
        ep_size: int,
        key: DispatchKey,
        hidden: Tensor,
        weights: Tensor,
        first_token: int,
        patience_s: float,
        deadline: float,
    ) -> None:
        self._peers = peers
        self._layer = layer
        self._tables = tables
        self._ep_size = ep_size
        self._key = key
        self._hidden = hidden
        self._weights = weights
        self._first_token = first_token
        self._patience_s = patience_s
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._failed: set[int] = set()
        self._attempts = 0
        self._sends: list[Send] = []

    async def post(self, groups: Sequence[GroupDispatch]) -> None:
        """Send to all `groups`, until all bytes have left. One that fails is for `complete`."""
        self._sends = await self._send(groups)

    async def complete(self) -> None:
        """Until every row has its partials, or it is known that it will not have them."""
        for send in self._sends:
            if send.error is not None or not await send.receive():
                await self._rescue()
                return

    @property
    def counted(self) -> list[Send]:
        """Whose partials make up the sum, in ascending rank order; once complete."""
        if not self._attempts:
            return self._sends
        found = [each for send in self._sends for each in send.counted()]
        return sorted(found, key=lambda send: (send.ep_rank, send.dispatch.key.attempt))

    @property
    def lost(self) -> tuple[LostRows, ...]:
        """Rows that have no sum; once complete."""
        if not self._attempts:
            return ()
        return tuple(self._lost_of(each) for send in self._sends for each in send.abandoned())

    def release(self) -> None:
        """Nothing more is wanted, whatever has come of it."""
        for send in self._sends:
            for each in send.all():
                each.release()

    async def _send(
        self, groups: Sequence[GroupDispatch], instead_of: Send | None = None
    ) -> list[Send]:
        now = self._loop.time()
        sends = [self._make_send(group, now, instead_of) for group in groups]
        try:
            slow = []
            for send in sends:
                for part in send.parts:
                    part.answer = part.link.try_dispatch(send.dispatch)
                    if part.answer is None:
                        slow.append((send, part))
            if slow:  # those that have to wait for a slot wait together
                await all_ended([asyncio.create_task(self._depart(*each)) for each in slow])
            for send in sends:
                for part in send.parts:
                    if part.answer is not None:
                        await self._depart(send, part)
        except BaseException:
            for send in sends:
                send.release()
            raise
        return sends

    def _make_send(self, group: GroupDispatch, now: float, instead_of: Send | None) -> Send:
        key, hidden, weights = self._key, self._hidden, self._weights
        if self._attempts:
            key = key._replace(attempt=self._attempts)
        if group.rows is not None:
            hidden, weights = hidden[group.rows], weights[group.rows]
        dispatch = Dispatch(key, hidden, group.physical_ids, weights)
        # A large batch takes a slot's worth after the other.
        patience_s = self._patience_s * max(1, -(-dispatch.num_tokens // SLOT_TOKENS))
        late_at = min(now + patience_s, self._deadline)
        links = self._peers.group(group.ep_rank)
        send = Send(group, dispatch, tuple(map(Part, links)), now, late_at, instead_of)
        if not links:
            why = self._peers.why_down(group.ep_rank)
            send.error = PeerLostError(f"{why}: layer {key.layer_id}")
        return send

    async def _depart(self, send: Send, part: Part) -> None:
        """Until its bytes have left, it has failed, or it is late and others can be asked."""
        if send.error is not None:
            return
        try:
            await self._leave(send, part, send.late_at)
        except PeerTimeoutError as error:
            if self._loop.time() >= self._deadline or self._others_hold(send):
                send.error = error
                return
            await self._depart_at_last(send, part)
        except TransportError as error:
            send.error = error

    async def _depart_at_last(self, send: Send, part: Part) -> None:
        try:
            await self._leave(send, part, self._deadline)
        except TransportError as error:
            send.error = error

    async def _leave(self, send: Send, part: Part, until: float) -> None:
        timeout_s = max(0.0, until - self._loop.time())
        if part.answer is None:
            part.answer = await part.link.dispatch(send.dispatch, timeout_s)
        else:
            await part.answer.left(timeout_s)

    async def _rescue(self) -> None:
        while True:
            for send in self._unfinished():
                send.look()
                if send.error is not None and send.ep_rank not in self._failed:
                    self._note_failure(send)
            if await self._replace_failed():
                continue
            if all(send.complete for send in self._sends):
                return
            now = self._loop.time()
            late = [send for send in self._outstanding() if send.late_at <= now]
            if now >= self._deadline:
                await asyncio.gather(*(send.expire() for send in late))
            elif not await self._hedge(late):
                ends = [send.late_at for send in self._outstanding() if send.late_at > now]
                await self._next_answer(min([self._deadline, *ends]) - now)

    def _unfinished(self) -> list[Send]:
        return [each for send in self._sends for each in send.unfinished()]

    def _outstanding(self) -> list[Send]:
        return [send for send in self._unfinished() if send.outstanding]

    async def _replace_failed(self) -> bool:
        """False where nothing has failed."""
        failed = [send for send in self._unfinished() if send.error and send.substitutes is None]
        for send in failed:
            send.keep_answered()
            send.release()  # the other shards' answers with it
        for send in failed:
            await self._substitute(send, *self._plan_again(send, self._failed))
        return bool(failed)

    def _note_failure(self, send: Send) -> None:
        """Its group is not asked again in this layer."""
        self._failed.add(send.ep_rank)
        if isinstance(send.error, PeerTimeoutError):
            self._peers.late(send.ep_rank, send.owed, send.sent_at)
        else:
            self._peers.failed(send.ep_rank, self._loop.time())

    async def _hedge(self, late: Sequence[Send]) -> bool:
        """Ask others as well, where they hold all of it. False where none do."""
        hedged = False
        for send in late:
            if send.substitutes is not None:
                continue
            groups, uncovered = self._plan_again(send, self._failed | self._avoided())
            if uncovered.numel():
                send.late_at = self._deadline
                continue
            self._peers.late(send.ep_rank, send.owed, send.sent_at)
            await self._substitute(send, groups, uncovered)
            hedged = True
        return hedged

    async def _substitute(
        self, send: Send, groups: Sequence[GroupDispatch], uncovered: Tensor
    ) -> None:
        self._attempts += 1
        send.uncovered = uncovered
        send.substitutes = await self._send(groups, send)

    def _others_hold(self, send: Send) -> bool:
        _, uncovered = self._plan_again(send, self._failed | self._avoided())
        return not uncovered.numel()

    def _plan_again(self, send: Send, down: set[int]) -> tuple[list[GroupDispatch], Tensor]:
        """Groups for what `send` was to compute, none of `down` and none that had it before; and
        the positions of its rows for which there is none."""
        now = self._loop.time()
        if now >= self._deadline:
            return [], (send.rest.physical_ids >= 0).any(dim=1).nonzero()[:, 0]
        stands = list(self._peers.standing(self._ep_size, now) or (USUAL,) * self._ep_size)
        for ep_rank in down | send.tried:
            stands[ep_rank] = DOWN
        tables = self._tables(tuple(stands))
        return plan_again(tables, send.rest, self._hidden.shape[0], self._first_token)

    def _avoided(self) -> set[int]:
        standing = self._peers.standing(self._ep_size, self._loop.time())
        return {ep_rank for ep_rank, stand in enumerate(standing) if stand == AVOIDED}

    async def _next_answer(self, timeout_s: float) -> None:
        """Until any answer comes, or the time is up."""
        answers = [answer for send in self._outstanding() for answer in send.awaited]
        tasks = [asyncio.create_task(answer.settled(timeout_s)) for answer in answers]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _lost_of(self, send: Send) -> LostRows:
        assert send.error is not None
        assert send.uncovered is not None
        rows, ids = send.rest.rows, send.rest.physical_ids[send.uncovered]
        lost = send.uncovered if rows is None else rows[send.uncovered]
        return LostRows(lost, exchange_words.failed(send.error, self._layer, ids))
