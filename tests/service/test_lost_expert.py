"""Expert processes killed with a dispatch half answered, or that never answer, over each wire."""

import asyncio

import pytest
import torch
from torch import Tensor

from attn_service.expert_client import ExpertClient
from attn_service.experts import LostRows, StepKey
from attn_service.peers import Peers
from attn_service.placements import Placements
from moe_core.config.parallel import ParallelConfig
from moe_core.model.tensor_parallel import NoTensorParallel
from moe_core.placement import ExpertPlacement
from moe_core.transport.base import Dispatch, ExpertLink, Reply
from support.exchange_ends import LATE, SILENT, SPEC, behave, connect, serve, until
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
            exchanging = asyncio.create_task(_exchange(client_of(links, PARALLEL), LAYER))
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


@pytest.mark.parametrize(
    ("num_tokens", "phase"),
    [
        (6, "queue (it waits for its turn at the peer)"),
        (NUM_TOKENS, f"queue: all {SPEC.slot_count} slots are in flight"),
    ],
)
@pytest.mark.parametrize("wire", ["grpc", "nixl"])
async def test_a_timeout_names_peer_layer_experts_bytes_and_phase(
    wire: str, num_tokens: int, phase: str
) -> None:
    """Of an expert process that holds all experts, alone."""
    async with serve(SPEC, wire) as expert:
        link = await connect(expert.address, SPEC, wire)
        client = client_of([link], ParallelConfig(), wait_s=0.3)
        (lost,) = await _exchange(client, SILENT, num_tokens)
        assert len(lost.rows) == num_tokens
        sent = min(num_tokens, SPEC.slot_tokens)  # or would have been
        num_bytes = sent * SPEC.hidden_size * SPEC.dtype.itemsize
        assert f"expert 1 ({expert.address}): no progress in 0." in lost.reason
        assert f"layer {SILENT}, {sent} tokens, {num_bytes} bytes, phase: {phase}" in lost.reason
        needed = sorted(set(ROUTING.topk_ids[:num_tokens].flatten().tolist()))
        assert f"experts {', '.join(map(str, needed))})" in lost.reason
        await link.close()


def client_of(
    links: list[ExpertLink], parallel: ParallelConfig, wait_s: float = WAIT_S
) -> ExpertClient:
    placement = ExpertPlacement.initial(MODEL, parallel.with_model(MODEL))
    placements = Placements(placement, CPU)
    peers = Peers(1, links)
    return ExpertClient(peers, parallel, placements, NoTensorParallel(), expert_wait_s=wait_s)


async def _exchange(
    client: ExpertClient, layer_id: int, num_tokens: int = NUM_TOKENS
) -> tuple[LostRows, ...]:
    """The rows that nobody could compute."""
    each = (ROUTING.hidden, ROUTING.topk_ids, ROUTING.topk_weights)
    tokens = [tensor[:num_tokens] for tensor in each]
    pending = await client.dispatch(StepKey(0, 1), layer_id, *tokens)
    return (await pending.combine()).lost
