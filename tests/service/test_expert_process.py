"""Whole expert processes' lives, in one event loop with a real gateway's registry, over gRPC."""

import asyncio
import re
from contextlib import AsyncExitStack
from functools import partial

import pytest
import torch

from attn_service.experts import StepKey
from expert_service.servicer import ExchangeGate
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.cluster import Role
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import TransportError, UnavailableError
from moe_core.service.grpc_host import GrpcHost
from moe_core.service.membership import Membership
from moe_core.transport.base import Identity, LinkSpec
from moe_core.transport.connect import connect_link
from support.expert_processes import (
    MODEL_DIR,
    OPTIONS,
    TIMEOUT_S,
    connected_client,
    expected,
    join_as_attention,
    running_expert,
    running_gateway,
)
from support.expert_tier import random_routing

LAYOUTS = {
    "off_etp2": ParallelConfig(expert_devices=2),
    "level2_redundant_shared": ParallelConfig(
        expert_devices=2,
        ep_size=2,
        expert_parallel_degree=2,
        num_redundant_experts=2,
        shared_experts="expert",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_expert_processes_serve_what_one_process_would_compute(layout: str) -> None:
    checkpoint = Checkpoint.open(MODEL_DIR)
    layer_id = checkpoint.config.moe_layer_ids[-1]
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(running_gateway(LAYOUTS[layout]))
        for rank in (1, 0):
            await stack.enter_async_context(running_expert(gateway, rank=rank))
        membership = await join_as_attention(gateway, checkpoint)
        stack.push_async_callback(membership.close)
        state = await membership.wait_until(
            lambda state: not state.missing(Role.EXPERT), TIMEOUT_S, "all expert processes"
        )
        client = await stack.enter_async_context(connected_client(state, checkpoint))
        routing = random_routing(checkpoint.config, 5, torch.float64, 1)
        pending = await client.dispatch(
            StepKey(0, 0), layer_id, routing.hidden, routing.topk_ids, routing.topk_weights
        )
        total = (await pending.combine()).hidden_states
        alone = expected(checkpoint, layer_id, routing, state.parallel.shared_on_experts)
        torch.testing.assert_close(total, alone, rtol=1e-12, atol=1e-12)


async def test_a_process_reads_only_its_own_experts() -> None:
    """Two EP groups without copies read half of the experts' bytes each."""
    config = Checkpoint.open(MODEL_DIR).config
    parallel = ParallelConfig(expert_devices=2, ep_size=2)
    async with running_gateway(parallel) as gateway, running_expert(gateway) as process:
        read = process.weight_bytes_read
    per_expert = 3 * config.hidden_size * config.moe.moe_intermediate_size
    itemsize = {"float32": 4, "bfloat16": 2}[config.dtype]
    whole = len(config.moe_layer_ids) * config.moe.num_experts * per_expert * itemsize
    assert read == whole // 2


async def test_whoever_comes_before_the_weights_are_loaded_is_told_so() -> None:
    host = GrpcHost()
    ExchangeGate().add_to(host)
    port = await host.start("127.0.0.1", 0)
    spec = LinkSpec("f", torch.float32, 8, 2, 4, 1)
    try:
        with pytest.raises(TransportError, match="still loading"):
            await connect_link(
                f"127.0.0.1:{port}", spec, Identity(0, 1, 1), Identity(0, 1, 1), OPTIONS
            )
    finally:
        await host.stop(0)


async def test_a_process_that_is_drained_ends_its_exchanges_and_leaves_the_cluster() -> None:
    checkpoint = Checkpoint.open(MODEL_DIR)
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(running_gateway(ParallelConfig()))
        membership = await join_as_attention(gateway, checkpoint)
        stack.push_async_callback(membership.close)
        async with running_expert(gateway):
            state = await membership.wait_until(
                lambda state: not state.missing(Role.EXPERT), TIMEOUT_S, "the expert process"
            )
            client = await stack.enter_async_context(connected_client(state, checkpoint))
        await membership.wait_until(
            lambda state: not state.tier(Role.EXPERT), TIMEOUT_S, "the expert's leaving"
        )
        routing = random_routing(checkpoint.config, 1, torch.float64, 1)
        layer_id = checkpoint.config.moe_layer_ids[0]
        pending = await client.dispatch(
            StepKey(0, 0), layer_id, routing.hidden, routing.topk_ids, routing.topk_weights
        )
        (lost,) = (await pending.combine()).lost
        assert re.match(rf"layer {layer_id} needs experts .* of expert 0 \(.*gone", lost.reason)


async def test_a_process_whose_gateway_stays_away_ends_with_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    join = partial(Membership.join, rejoin_timeout_s=1)
    monkeypatch.setattr(Membership, "join", join)
    async with AsyncExitStack() as outer:
        async with running_gateway(ParallelConfig()) as gateway:
            process = await outer.enter_async_context(running_expert(gateway))
            serving = asyncio.create_task(process.serve())
            await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="none took it back within 1 s"):
            await asyncio.wait_for(serving, TIMEOUT_S)
