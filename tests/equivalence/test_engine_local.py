"""The engine, with both tiers in one process, against transformers' greedy tokens."""

import re

import pytest
import torch

from attn_service.sequence import Sampling, SequenceRequest
from moe_core.config.parallel import ParallelConfig
from support.local_engine import Generated, local_engine
from support.tiny_checkpoints import Checkpoints, Reference, prompts

NUM_TOKENS = 12
LEVEL_0 = ParallelConfig()
LEVEL_1 = ParallelConfig(expert_devices=4, ep_size=2)
LEVEL_2 = ParallelConfig(
    expert_devices=2, ep_size=2, expert_parallel_degree=2, shared_experts="expert"
)


def greedy(references: list[Reference], num_tokens: int = NUM_TOKENS) -> list[SequenceRequest]:
    sampling = Sampling(max_tokens=num_tokens)
    return [SequenceRequest(str(i), each.prompt, sampling) for i, each in enumerate(references)]


def expected(references: list[Reference]) -> dict[str, Generated]:
    return {
        str(i): Generated(each.tokens[:NUM_TOKENS], "length") for i, each in enumerate(references)
    }


@pytest.mark.parametrize("parallel", [LEVEL_0, LEVEL_1, LEVEL_2], ids=["ep0", "ep1-etp2", "ep2"])
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe-norm", "mixtral"])
async def test_a_mixed_batch_gives_the_tokens_of_transformers(
    checkpoints: Checkpoints, name: str, parallel: ParallelConfig
) -> None:
    directory = checkpoints.directory(name)
    wanted = checkpoints.references(name)
    if name != "deepseek_v3" and parallel.shared_on_experts:
        parallel = ParallelConfig(expert_devices=2, ep_size=2, expert_parallel_degree=2)
    async with local_engine(directory, parallel, dtype=torch.float64, max_step_tokens=24) as local:
        assert await local.generate(greedy(wanted)) == expected(wanted)


async def test_prompts_in_chunks_and_few_blocks_change_no_token(checkpoints: Checkpoints) -> None:
    directory = checkpoints.directory("deepseek_v3")
    wanted = checkpoints.references("deepseek_v3")
    async with local_engine(
        directory,
        LEVEL_2,
        dtype=torch.float64,
        kv_cache_tokens=64,  # the longest alone fills most of it: the others wait for blocks
        max_num_seqs=3,
        max_step_tokens=5,
    ) as local:
        assert await local.generate(greedy(wanted)) == expected(wanted)
        load = local.engine.load
    assert load.free_kv_blocks == load.total_kv_blocks == 4


async def test_a_lost_expert_process_ends_requests_with_its_name_and_layer(
    checkpoints: Checkpoints,
) -> None:
    directory = checkpoints.directory("deepseek_v3")
    wanted = checkpoints.references("deepseek_v3")
    async with local_engine(directory, LEVEL_1, dtype=torch.float32, expert_wait_s=0.2) as local:
        await local.links[2].close()
        results = await local.generate(greedy(wanted))
        load = local.engine.load
    assert {result.finish_reason for result in results.values()} == {"error"}
    for result in results.values():
        assert re.match(r"layer 1 needs experts \d+.* of expert 2 \(local\)", result.error)
    assert load.free_kv_blocks == load.total_kv_blocks


async def test_a_sampled_sequence_is_the_same_alone_and_in_a_batch(
    checkpoints: Checkpoints,
) -> None:
    directory = checkpoints.directory("deepseek_v3")
    sampling = Sampling(max_tokens=NUM_TOKENS, temperature=1.0, top_p=0.9, seed=17)
    requests = [SequenceRequest(str(i), prompt, sampling) for i, prompt in enumerate(prompts(127))]
    async with local_engine(directory, LEVEL_0, dtype=torch.float64) as local:
        together = await local.generate(requests)
        alone = [await local.generate([request]) for request in requests]
    assert together == {name: result for each in alone for name, result in each.items()}
    assert len({result.token_ids for result in together.values()}) == len(requests)
