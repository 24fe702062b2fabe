"""A real exchange whose dispatches go in chunks, and a process that dies between two of them."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from attn_service.expert_client import ExpertClient
from attn_service.experts import StepKey
from attn_service.peers import Peers
from attn_service.placements import Placements
from expert_service.batcher import Batcher
from moe_core.config.parallel import ParallelConfig
from moe_core.model.tensor_parallel import NoTensorParallel
from moe_core.placement import ExpertPlacement
from support.dying_links import MOMENTS, DyingLink
from support.expert_tier import CPU, expected_output, make_batchers, make_spec, random_routing
from support.moe_configs import moe_model

MODEL = moe_model(num_experts=8, top_k=3, n_shared_experts=1)
LAYER, NUM_TOKENS, SLOT_TOKENS, VICTIM = 2, 30, 4, 1
ROUTING = random_routing(MODEL, NUM_TOKENS, torch.float64, 4)
LAYOUTS = {
    "level1": ParallelConfig(expert_devices=2, ep_size=2, num_redundant_experts=8),
    "level1-etp2": ParallelConfig(expert_devices=4, ep_size=2, num_redundant_experts=8),
    "level2-shared": ParallelConfig(
        expert_devices=4,
        ep_size=4,
        expert_parallel_degree=2,
        num_redundant_experts=8,
        shared_experts="expert",
    ),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_a_process_that_dies_between_chunks_changes_no_sum(layout: str, moment: str) -> None:
    parallel = LAYOUTS[layout]
    placement = ExpertPlacement.initial(MODEL, parallel)
    batchers = make_batchers(MODEL, parallel, placement, torch.float64)
    expected = expected_output(MODEL, LAYER, ROUTING, parallel.shared_on_experts)

    async def exchange(dies_at: int) -> list[DyingLink]:
        links, total = await disturbed(parallel, placement, batchers, dies_at, moment)
        assert torch.allclose(total, expected, rtol=0, atol=1e-12)
        return links

    undisturbed = await exchange(-1)
    kept = 0
    for dies_at in range(-(-NUM_TOKENS // SLOT_TOKENS)):
        links = await exchange(dies_at)
        kept += links[VICTIM].answered_rows
        if layout == "level1":  # one other process has copies, so it is sent each lost row once
            lost = undisturbed[VICTIM].answered_rows - links[VICTIM].answered_rows
            assert sum(link.sent_again for link in links) == lost
    assert kept > 0  # rows that were answered before the loss


async def disturbed(
    parallel: ParallelConfig,
    placement: ExpertPlacement,
    batchers: Sequence[Batcher],
    dies_at: int,
    moment: str,
) -> tuple[list[DyingLink], Tensor]:
    """One layer's exchange: the links after it, and the sums."""
    spec = make_spec(MODEL, parallel, torch.float64, slot_tokens=SLOT_TOKENS)
    links = [DyingLink(batcher.submit, spec) for batcher in batchers]
    links[VICTIM].dies_at, links[VICTIM].moment = dies_at, moment
    client = ExpertClient(
        Peers(parallel.etp_size, links),
        parallel,
        Placements(placement, CPU),
        NoTensorParallel(),
        expert_wait_s=10.0,
    )
    pending = await client.dispatch(
        StepKey(0, 1), LAYER, ROUTING.hidden, ROUTING.topk_ids, ROUTING.topk_weights
    )
    result = await pending.combine()
    assert result.lost == ()
    for link in links:
        if link.lost_because is None:  # all slots are free again
            assert len(link._slots._free) == spec.slot_count
        await link.close()
    return links, result.hidden_states
