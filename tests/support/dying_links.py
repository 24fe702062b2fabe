"""Local links whose process dies at a moment of choice, and links to a process that is slow."""

import asyncio

import torch

from moe_core.transport.base import Dispatch
from moe_core.transport.local import LocalLink
from moe_core.transport.pending import Pending
from moe_core.transport.session import SlotReply

MOMENTS = ("posting", "posted", "answering")


class DyingLink(LocalLink):
    """Dies at its chunk number `dies_at` (from 0): before that one is sent, once it is sent, or
    when its answer is on its way. posted: how many chunks were sent."""

    dies_at = -1
    moment = "posting"
    posted = 0

    def try_dispatch(self, dispatch: Dispatch) -> Pending | None:
        if self.moment == "posting" and self.posted == self.dies_at:
            self._lost("killed before it was sent anything more")
        return super().try_dispatch(dispatch)

    def _post(self, slot: int, sequence: int, chunk: Dispatch, num_tokens: int) -> None:
        super()._post(slot, sequence, chunk, num_tokens)
        number, self.posted = self.posted, self.posted + 1
        if number == self.dies_at and self.moment != "answering":
            self.loop.call_soon(self._lost, "killed with a dispatch on its way")

    def answered(
        self, reply: SlotReply, partial: torch.Tensor, queue_us: int, compute_us: int
    ) -> None:
        if self.moment == "answering" and self.posted > self.dies_at >= 0:
            self._lost("killed with an answer on its way")
        super().answered(reply, partial, queue_us, compute_us)


class SlowLink(LocalLink):
    """Every answer takes `delay_s` longer."""

    delay_s = 0.05

    def answered(
        self, reply: SlotReply, partial: torch.Tensor, queue_us: int, compute_us: int
    ) -> None:
        copy = partial.clone()
        asyncio.get_running_loop().call_later(
            self.delay_s, super().answered, reply, copy, queue_us, compute_us
        )
