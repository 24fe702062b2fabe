"""The same tokens when expert processes die, come back or are slow, in float64."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import torch

from attn_service.sequence import Sampling, SequenceRequest
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from support.dying_links import MOMENTS, DyingLink, SlowLink
from support.local_engine import LocalEngine, local_engine
from support.rank_pool import RankPool
from support.tiny_checkpoints import Checkpoints

NAME = "deepseek_v3"
NUM_TOKENS = 3
VICTIM = 1
LAYOUTS = {
    "level1": ParallelConfig(expert_devices=2, ep_size=2),
    "level1-etp2": ParallelConfig(expert_devices=4, ep_size=2),
    "level2-shared": ParallelConfig(
        expert_devices=4, ep_size=4, expert_parallel_degree=2, shared_experts="expert"
    ),
}


def copies_of_all(checkpoints: Checkpoints, layout: str) -> ParallelConfig:
    num_experts = ModelConfig.from_hf(checkpoints.directory(NAME)).moe.num_experts
    return replace(LAYOUTS[layout], num_redundant_experts=num_experts)


@asynccontextmanager
async def served(
    checkpoints: Checkpoints, parallel: ParallelConfig, **settings: object
) -> AsyncIterator[LocalEngine]:
    """Blocks are longer than what is generated, so nothing is found in the prefix cache."""
    async with local_engine(
        checkpoints.directory(NAME),
        parallel,
        dtype=torch.float64,
        max_step_tokens=40,
        block_size=128,
        **settings,
    ) as local:
        yield local


def requests(checkpoints: Checkpoints, num_tokens: int = NUM_TOKENS) -> list[SequenceRequest]:
    prompts = [each.prompt for each in checkpoints.references(NAME)]
    kinds = (Sampling(num_tokens), Sampling(num_tokens, temperature=0.9, seed=3))
    return [
        SequenceRequest(f"{i}.{j}", prompt, sampling)
        for i, prompt in enumerate(prompts)
        for j, sampling in enumerate(kinds)
    ]


def revive(local: LocalEngine, rank: int) -> None:
    local.peers.put(rank, local.make_link(rank, DyingLink))


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_a_process_that_dies_at_any_point_changes_no_token(
    checkpoints: Checkpoints, layout: str, moment: str
) -> None:
    parallel, work = copies_of_all(checkpoints, layout), requests(checkpoints)
    async with served(checkpoints, parallel, microbatches="2") as local:
        revive(local, VICTIM)
        undisturbed = await local.generate(work)
        for index, reference in enumerate(checkpoints.references(NAME)):
            assert undisturbed[f"{index}.0"].token_ids == reference.tokens[:NUM_TOKENS]
        link = local.peers.links[VICTIM]
        assert isinstance(link, DyingLink)
        every = 1 if (layout, moment) == ("level2-shared", "posted") else 5
        for dies_at in range(0, link.posted, every):
            revive(local, VICTIM)
            link = local.peers.links[VICTIM]
            link.dies_at, link.moment = dies_at, moment
            assert await local.generate(work) == undisturbed, dies_at
            assert link.lost_because is not None
        load = local.engine.load
    assert load.free_kv_blocks == load.total_kv_blocks


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_without_copies_requests_wait_until_the_process_is_back(
    checkpoints: Checkpoints, layout: str
) -> None:
    work = requests(checkpoints)
    async with served(checkpoints, LAYOUTS[layout]) as local:
        undisturbed = await local.generate(work)
        for dies_at in (0, 3, 5):
            revive(local, VICTIM)
            link = local.peers.links[VICTIM]
            link.dies_at, link.moment = dies_at, "posted"
            running = asyncio.create_task(local.generate(work))
            async with asyncio.timeout(10.0):
                while link.lost_because is None:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert not running.done()
            revive(local, VICTIM)
            local.engine.wake()
            assert await running == undisturbed


async def test_without_copies_and_without_return_requests_end_with_names(
    checkpoints: Checkpoints,
) -> None:
    async with served(checkpoints, LAYOUTS["level1"], expert_wait_s=0.3) as local:
        await local.generate(requests(checkpoints))  # what is slow the first time only
        await local.links[VICTIM].close()
        started = asyncio.get_running_loop().time()
        results = await local.generate(requests(checkpoints))
        assert asyncio.get_running_loop().time() - started < 0.3 + 1.0
        load = local.engine.load
    assert {result.finish_reason for result in results.values()} == {"error"}
    for result in results.values():
        assert re.search(r"layer 1 needs experts \d+.* of expert 1 \(local\)", result.error)
    assert load.free_kv_blocks == load.total_kv_blocks


async def test_a_slow_process_changes_no_token_and_is_seldom_waited_for(
    checkpoints: Checkpoints,
) -> None:
    parallel, work = copies_of_all(checkpoints, "level2-shared"), requests(checkpoints, 12)
    async with served(checkpoints, parallel, hedge_after_s=0.03) as local:
        undisturbed = await local.generate(work)
        slow = local.make_link(VICTIM, SlowLink)
        local.peers.put(VICTIM, slow)
        assert await local.generate(work) == undisturbed
        usual = local.links[VICTIM].counters.dispatches
        assert 0 < slow.counters.dispatches < usual / 2


@pytest.mark.parametrize("copies", [True, False], ids=["copies", "no-copies"])
@pytest.mark.parametrize("dies", [(0, 1, 0), (0, 1, 7), (1, 0, 3)])
def test_the_ranks_of_a_group_agree_on_what_one_of_them_has_lost(
    checkpoints: Checkpoints, rank_pool: RankPool, dies: tuple[int, int, int], copies: bool
) -> None:
    """With copies nothing is lost; without, the same steps are repeated on both ranks."""
    redundant = copies_of_all(checkpoints, "level1").num_redundant_experts if copies else 0
    parallel = ParallelConfig(
        attn_devices=2, expert_devices=2, ep_size=2, num_redundant_experts=redundant
    )
    references = checkpoints.references(NAME)
    answers = rank_pool.run(
        checkpoints.directory(NAME),
        parallel,
        "local",
        [[[reference.prompt for reference in references]]],
        NUM_TOKENS + 3,
        dtype="float64",
        num_microbatches=2,
        dies=dies,
    )
    wanted = [list(reference.tokens[: NUM_TOKENS + 3]) for reference in references]
    for answer in answers:
        assert [one["tokens"] for one in answer["batches"][0]] == wanted
    assert answers[dies[0]]["lost"][dies[1]] is not None
    assert [answer["lost_steps"] for answer in answers] == [0 if copies else 1] * 2
