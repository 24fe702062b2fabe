"""ExpertClient, links, batchers and runners together, against one loop over all experts."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attn_service.dispatch_plan import plan_dispatch
from attn_service.expert_client import ExpertClient
from attn_service.experts import StepKey
from attn_service.peers import Peers
from attn_service.placements import Placements
from attn_service.replica_choice import LayerTables
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.model.tensor_parallel import NoTensorParallel, TensorParallel
from moe_core.placement import ExpertPlacement
from moe_core.transport.local import LocalLink
from support.expert_tier import (
    CPU,
    Routing,
    expected_output,
    make_batchers,
    make_spec,
    random_routing,
)
from support.moe_configs import moe_model

MODEL = moe_model(num_experts=8, top_k=3, n_shared_experts=2, num_layers=3)
LAYER = 2
WAIT_S = 20.0
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

LAYOUTS = {
    "off": ParallelConfig(),
    "off_etp2": ParallelConfig(expert_devices=2),
    "level1": ParallelConfig(expert_devices=4, ep_size=4),
    "level1_etp2": ParallelConfig(expert_devices=4, ep_size=2),
    "level1_redundant": ParallelConfig(expert_devices=4, ep_size=4, num_redundant_experts=5),
    "level2": ParallelConfig(expert_devices=4, ep_size=4, expert_parallel_degree=2),
    "level2_redundant": ParallelConfig(
        expert_devices=4, ep_size=4, expert_parallel_degree=2, num_redundant_experts=24
    ),
}


@dataclass(frozen=True)
class Tier:
    model: ModelConfig
    parallel: ParallelConfig
    placement: ExpertPlacement
    links: tuple[LocalLink, ...]

    def client(
        self, tensor_parallel: TensorParallel | None = None, wait_s: float = WAIT_S
    ) -> ExpertClient:
        return ExpertClient(
            Peers(self.parallel.etp_size, self.links),
            self.parallel,
            Placements(self.placement, CPU),
            tensor_parallel or NoTensorParallel(),
            expert_wait_s=wait_s,
        )

    async def run(self, routing: Routing) -> Tensor:
        return await exchange(self.client(), routing)


async def exchange(client: ExpertClient, routing: Routing) -> Tensor:
    pending = await client.dispatch(
        StepKey(0, 1), LAYER, routing.hidden, routing.topk_ids, routing.topk_weights
    )
    return (await pending.combine()).hidden_states


@asynccontextmanager
async def tier(
    parallel: ParallelConfig, dtype: torch.dtype, shared: str = "attention", slot_tokens: int = 64
) -> AsyncIterator[Tier]:
    from dataclasses import replace

    parallel = replace(parallel, shared_experts=shared).with_model(MODEL)
    placement = ExpertPlacement.initial(MODEL, parallel)
    batchers = make_batchers(MODEL, parallel, placement, dtype)
    spec = make_spec(MODEL, parallel, dtype, slot_tokens)
    links = tuple(
        LocalLink(batcher.submit, spec, peer=f"expert {rank}")
        for rank, batcher in enumerate(batchers)
    )
    try:
        yield Tier(MODEL, parallel, placement, links)
    finally:
        for link in links:
            await link.close()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shared", ["attention", "expert"])
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_every_layout_equals_one_loop_over_all_experts(
    layout: str, shared: str, dtype: torch.dtype
) -> None:
    async with tier(LAYOUTS[layout], dtype, shared) as experts:
        for seed, num_tokens in enumerate((1, 2, 17)):
            routing = random_routing(MODEL, num_tokens, dtype, seed)
            expected = expected_output(MODEL, LAYER, routing, shared == "expert")
            actual = await experts.run(routing)
            assert actual.dtype == dtype
            bound = TOLERANCE[dtype]
            torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("layout", ["level1", "level2"])
async def test_a_batch_larger_than_a_slot_gives_the_same_sum(layout: str) -> None:
    async with tier(LAYOUTS[layout], torch.float64, slot_tokens=4) as experts:
        routing = random_routing(MODEL, 41, torch.float64, 3)
        expected = expected_output(MODEL, LAYER, routing, False)
        actual = await experts.run(routing)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", ["attention", "expert"])
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_links_count_the_bytes_of_the_formula(layout: str, shared: str) -> None:
    """Below Level 2 every process is sent every token; at Level 2 the tokens that have a chosen
    expert there, and as many rows come back."""
    async with tier(LAYOUTS[layout], torch.float32, shared) as experts:
        parallel = experts.parallel
        rows = [0] * parallel.expert_devices
        messages = [0] * parallel.expert_devices
        for seed, num_tokens in enumerate((1, 3, 20, 0)):
            routing = random_routing(MODEL, num_tokens, torch.float32, seed)
            await experts.run(routing)
            for rank in range(parallel.expert_devices):
                sent = rows_for(experts, routing, rank)
                rows[rank] += sent
                messages[rank] += sent > 0
        for rank, link in enumerate(experts.links):
            expected = rows[rank] * MODEL.hidden_size * 4
            assert link.counters.dispatch_bytes == expected
            assert link.counters.combine_bytes == expected
            assert link.counters.dispatches == messages[rank]


def rows_for(experts: Tier, routing: Routing, rank: int) -> int:
    """Counted from the routing; which copy of a replicated expert was taken, from the plan."""
    parallel, layer = experts.parallel, experts.placement.layer(LAYER)
    ep_rank = parallel.expert_ranks(rank)[0]
    if parallel.degree < 2:
        return routing.topk_ids.shape[0]
    if parallel.num_redundant_experts == 0:
        held = set(layer.logical_experts(ep_rank))
        return sum(bool(held & set(chosen)) for chosen in routing.topk_ids.tolist())
    tables = LayerTables.build(layer, parallel.ep_size, CPU)
    plan = plan_dispatch(tables, routing.topk_ids, 2, parallel.shared_on_experts, LAYER)
    return sum(g.physical_ids.shape[0] for g in plan if g.ep_rank == ep_rank)


async def test_at_level_2_a_process_without_a_chosen_expert_gets_no_message() -> None:
    async with tier(LAYOUTS["level2"], torch.float32, "expert") as experts:
        held = experts.placement.layer(LAYER).logical_experts(1)
        chosen = torch.tensor([[held[0], held[1], held[0]]] * 5)
        routing = random_routing(MODEL, 5, torch.float32, 0)
        await experts.run(Routing(routing.hidden, chosen, routing.topk_weights))
        assert [link.counters.dispatches for link in experts.links] == [0, 1, 0, 0]


class Group:
    """Attention TP ranks in one event loop; a rank's all_gather returns what the test collects."""

    def __init__(self, rank: int, size: int, gathered: list[Tensor], sizes: list[int]) -> None:
        self.rank = rank
        self.size = size
        self._gathered = gathered
        self._sizes = sizes

    def all_reduce(self, x: Tensor) -> Tensor:
        raise AssertionError("the exchange needs no all_reduce")

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        assert x.shape[0] == sizes[self.rank]
        self._gathered.append(x)
        self._sizes[:] = sizes
        return x


@pytest.mark.parametrize("layout", ["level1_etp2", "level2"])
@pytest.mark.parametrize("num_tokens", [1, 6, 7])
async def test_attention_tp_ranks_send_their_share_and_gather_the_whole(
    layout: str, num_tokens: int
) -> None:
    async with tier(LAYOUTS[layout], torch.float64, "expert") as experts:
        routing = random_routing(MODEL, num_tokens, torch.float64, 5)
        gathered: list[Tensor] = []
        sizes: list[int] = []
        for rank in range(4):
            await exchange(experts.client(Group(rank, 4, gathered, sizes)), routing)
        assert sum(sizes) == num_tokens
        assert max(sizes) - min(sizes) <= 1
        expected = expected_output(MODEL, LAYER, routing, True)
        torch.testing.assert_close(torch.cat(gathered), expected, rtol=1e-12, atol=1e-12)
        if experts.parallel.degree < 2:
            once = num_tokens * MODEL.hidden_size * 8
            assert {link.counters.dispatch_bytes for link in experts.links} == {once}


async def test_many_attention_processes_get_each_their_own_sums() -> None:
    async with tier(LAYOUTS["level1"], torch.float64) as experts:
        routings = [random_routing(MODEL, n, torch.float64, n) for n in (1, 2, 3)]
        actual = await asyncio.gather(*(experts.run(routing) for routing in routings))
        for routing, total in zip(routings, actual, strict=True):
            expected = expected_output(MODEL, LAYER, routing, False)
            torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
