"""Attention and experts in one process: the oracle of the transport contract.

Knows neither wire nor bytes. Tensors are copied into slots of its own all the same, since the
contract lets the caller reuse its tensors and gives the handler views that end with its answer.
"""

import asyncio

import torch

from moe_core.errors import EpserveError
from moe_core.transport.base import Dispatch, DispatchHandler, LinkSpec
from moe_core.transport.flow import ChunkedLink
from moe_core.transport.pending import Named
from moe_core.transport.session import PeerSession, SlotReply
from moe_core.transport.whereabouts import PHASES


class LocalLink(ChunkedLink):
    """A link to a handler in this process, on this event loop."""

    def __init__(
        self, handler: DispatchHandler, spec: LinkSpec, *, peer: str = "expert 0 (local)"
    ) -> None:
        super().__init__(peer, "local", spec, spec.slot_tokens)
        self._session = _LocalSession(self, spec, handler)

    def _post(self, slot: int, sequence: int, chunk: Dispatch, num_tokens: int) -> None:
        copy = Dispatch(
            chunk.key,
            chunk.hidden_states.clone(),
            chunk.physical_ids.clone(),
            chunk.topk_weights.clone(),
        )
        asyncio.get_running_loop().call_soon(self._deliver, slot, sequence, copy)

    async def departed(self, slot: int, what: Named, deadline: float) -> None:
        """Nothing travels."""

    async def _phase_of(self, slot: int, sequence: int) -> str:
        return PHASES[self._session.where(slot, sequence)]

    def _deliver(self, slot: int, sequence: int, dispatch: Dispatch) -> None:
        if self._lost_because is None:
            self._session.deliver(slot, sequence, dispatch)

    def answered(
        self, reply: SlotReply, partial: torch.Tensor, queue_us: int, compute_us: int
    ) -> None:
        self._answered(reply.slot, reply.sequence, partial.clone(), queue_us, compute_us)

    def failed(self, reply: SlotReply, error: EpserveError) -> None:
        self._failed(reply.slot, reply.sequence, error.code, str(error))

    async def close(self) -> None:
        self._lost("closed on this side")
        self._session.close(in_order=True)


class _LocalSession(PeerSession):
    transport = "local"

    def __init__(self, link: LocalLink, spec: LinkSpec, handler: DispatchHandler) -> None:
        super().__init__("attn 0 (local)", spec, handler)
        self._link = link

    def _send_combine(
        self, reply: SlotReply, partial: torch.Tensor, queue_us: int, compute_us: int
    ) -> None:
        self._link.answered(reply, partial, queue_us, compute_us)

    def _send_failure(self, reply: SlotReply, error: EpserveError) -> None:
        self._link.failed(reply, error)
