"""Local links whose process dies at a moment of choice, and links to a process that is slow."""

import asyncio

import torch

from moe_core.transport.base import Dispatch, DispatchHandler, LinkSpec
from moe_core.transport.local import LocalLink
from moe_core.transport.pending import Pending
from moe_core.transport.session import SlotReply

MOMENTS = ("posting", "posted", "answering")


class DyingLink(LocalLink):
    """Dies at its chunk number `dies_at` (from 0): before that one is sent, once it is sent, or
    when its answer is on its way.

    posted: how many chunks were sent. answered_rows: of first attempts, those with something to
    compute. sent_again: rows of later attempts.
    """

    dies_at = -1
    moment = "posting"
    posted = 0
    answered_rows = 0
    sent_again = 0

    def __init__(self, handler: DispatchHandler, spec: LinkSpec, *, peer: str = "expert") -> None:
        super().__init__(handler, spec, peer=peer)
        self._rows_sent: dict[int, int] = {}

    def try_dispatch(self, dispatch: Dispatch) -> Pending | None:
        if self.moment == "posting" and self.posted == self.dies_at:
            self._lost("killed before it was sent anything more")
        return super().try_dispatch(dispatch)

    def _post(self, slot: int, sequence: int, chunk: Dispatch, num_tokens: int) -> None:
        super()._post(slot, sequence, chunk, num_tokens)
        number, self.posted = self.posted, self.posted + 1
        if chunk.key.attempt:
            self.sent_again += num_tokens
        else:
            self._rows_sent[sequence] = int((chunk.physical_ids >= 0).any(dim=1).sum())
        if number == self.dies_at and self.moment != "answering":
            self.loop.call_soon(self._lost, "killed with a dispatch on its way")

    def answered(
        self, reply: SlotReply, partial: torch.Tensor, queue_us: int, compute_us: int
    ) -> None:
        if self.moment == "answering" and self.posted > self.dies_at >= 0:
            self._lost("killed with an answer on its way")
        elif self.lost_because is None and not reply.key.attempt:
            self.answered_rows += self._rows_sent.pop(reply.sequence)
        super().answered(reply, partial, queue_us, compute_us)


class SlowLink(LocalLink):
    """Every answer takes `delay_s` longer."""

    delay_s = 0.2

    def answered(
        self, reply: SlotReply, partial: torch.Tensor, queue_us: int, compute_us: int
    ) -> None:
        copy = partial.clone()
        asyncio.get_running_loop().call_later(
            self.delay_s, super().answered, reply, copy, queue_us, compute_us
        )
