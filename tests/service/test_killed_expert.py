"""An expert process that is killed with a dispatch half answered, over each wire."""

import asyncio

import pytest
import torch
from torch import Tensor

from attn_service.expert_client import ExpertClient
from attn_service.experts import StepKey
from attn_service.peers import Peers
from attn_service.placements import Placements
from moe_core.config.parallel import ParallelConfig
from moe_core.model.tensor_parallel import NoTensorParallel
from moe_core.placement import ExpertPlacement
from moe_core.transport.base import Dispatch, ExpertLink, Reply
from support.exchange_ends import LATE, SPEC, behave, connect, serve, until
from support.exchange_peer import PeerProcess
from support.expert_tier import CPU, random_routing
from support.moe_configs import moe_model

LAYER, NUM_TOKENS, WAIT_S = LATE, 60, 30.0
MODEL = moe_model(hidden_size=SPEC.hidden_size, top_k=SPEC.num_columns, num_layers=LAYER + 1)
PARALLEL = ParallelConfig(
    expert_devices=2, ep_size=2, expert_parallel_degree=2, num_redundant_experts=8
)
ROUTING = random_routing(MODEL, NUM_TOKENS, SPEC.dtype, 4)


class Survivor:
    """Answers as the other does, and notes the rows that it is sent instead of that one."""

    def __init__(self) -> None:
        self.sent_again: list[Tensor] = []

    def __call__(self, dispatch: Dispatch, reply: Reply) -> None:
        if dispatch.key.attempt:
            self.sent_again.append(dispatch.hidden_states.clone())
        behave(dispatch, reply)


def noting_dispatches(link: ExpertLink) -> list[Dispatch]:
    found, send = [], link.dispatch

    async def dispatch(dispatch: Dispatch, timeout_s: float):
        found.append(dispatch)
        return await send(dispatch, timeout_s)

    link.dispatch = dispatch  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("wire", ["grpc", "nixl"])
async def test_exactly_the_rows_that_it_had_not_answered_are_sent_to_another(wire: str) -> None:
    survivor = Survivor()
    with PeerProcess(wire) as victim:
        async with serve(SPEC, wire, survivor) as other:
            links = [await connect(each, SPEC, wire) for each in (other.address, victim.address)]
            sent = noting_dispatches(links[1])
            client = ExpertClient(
                Peers(1, links),
                PARALLEL,
                Placements(ExpertPlacement.initial(MODEL, PARALLEL), CPU),
                NoTensorParallel(),
                expert_wait_s=WAIT_S,
            )
            exchanging = asyncio.create_task(_exchange(client))
            await until(lambda: links[1].counters.combine_bytes)
            victim.kill()
            assert await exchanging == ()
            for link in links:
                await link.close()
    (dispatch,) = sent
    row_bytes = SPEC.hidden_size * SPEC.dtype.itemsize
    answered = links[1].counters.combine_bytes // row_bytes
    assert 0 < answered < dispatch.num_tokens
    lost = dispatch.hidden_states[answered:]
    assert torch.equal(torch.cat(survivor.sent_again), lost)


async def _exchange(client: ExpertClient) -> tuple[object, ...]:
    """The rows that nobody could compute."""
    tokens = (ROUTING.hidden, ROUTING.topk_ids, ROUTING.topk_weights)
    pending = await client.dispatch(StepKey(0, 1), LAYER, *tokens)
    return (await pending.combine()).lost
