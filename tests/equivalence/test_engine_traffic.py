"""The same tokens whatever the batch, the chunks, the micro-batches, the preemptions and the prefix
hits.

Random traffic on the tiny model, against each request alone. In float64 every token is the same; in
float32 a request may differ only where its own undisturbed run came near a tie (DESIGN section 6).
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from attn_service.counters import EngineCounters
from support.engine_traffic import SHAPES, alone, among_others
from support.local_engine import Generated
from support.margins import MARGIN, recorded_margins
from support.tiny_checkpoints import Checkpoints

MODEL = "deepseek_v3"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny steps: threads that meet for each would cost more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference(one_thread: None, checkpoints: Checkpoints) -> dict[str, Generated]:
    async def run() -> dict[str, Generated]:
        runs = alone(checkpoints.directory(MODEL), torch.float64)
        return {request.sequence_id: generated async for request, generated in runs}

    return asyncio.run(run())


@dataclass(frozen=True)
class Undisturbed:
    """In float32, by request: what it generates alone, and how near a tie that came."""

    generated: dict[str, Generated]
    margins: dict[str, float]


@pytest.fixture(scope="module")
def undisturbed(one_thread: None, checkpoints: Checkpoints) -> Undisturbed:
    async def run() -> Undisturbed:
        found = Undisturbed({}, {})
        with recorded_margins() as margins:
            async for request, generated in alone(checkpoints.directory(MODEL), torch.float32):
                name = request.sequence_id
                found.generated[name] = generated
                found.margins[name] = margins.of(request, generated.token_ids)
        return found

    return asyncio.run(run())


@pytest.mark.parametrize("name", SHAPES)
async def test_traffic_gives_the_tokens_of_each_request_alone(
    checkpoints: Checkpoints, reference: dict[str, Generated], name: str
) -> None:
    directory = checkpoints.directory(MODEL)
    results, counters = await among_others(directory, SHAPES[name], torch.float64)
    assert results == reference
    assert len(results) >= 200
    _check_that_it_was_disturbed(name, counters)


@pytest.mark.parametrize("name", SHAPES)
async def test_in_float32_only_requests_near_a_tie_differ(
    checkpoints: Checkpoints, undisturbed: Undisturbed, name: str
) -> None:
    directory, margins = checkpoints.directory(MODEL), undisturbed.margins
    results, counters = await among_others(directory, SHAPES[name], torch.float32)
    assert results.keys() == undisturbed.generated.keys()
    differing = [each for each in results if results[each] != undisturbed.generated[each]]
    near = [each for each in results if margins[each] < MARGIN]
    print(f"{name}: {len(differing)} of {len(results)} differ, {len(near)} came near a tie")
    assert set(differing) <= set(near), {each: margins[each] for each in differing}
    assert len(near) < len(results) / 5, "else this says little"
    _check_that_it_was_disturbed(name, counters)


async def test_preemption_and_reuse_change_no_token_with_keys_and_values_per_head(
    checkpoints: Checkpoints,
) -> None:
    directory = checkpoints.directory("qwen3_moe-norm")
    wide, _ = await among_others(directory, SHAPES["wide"], torch.float64)
    few, counters = await among_others(directory, SHAPES["few blocks"], torch.float64)
    assert few == wide
    _check_that_it_was_disturbed("few blocks", counters)


def _check_that_it_was_disturbed(name: str, counters: EngineCounters) -> None:
    assert counters.prefix_hit_tokens > 0.2 * counters.prefix_query_tokens
    assert counters.used_kv_blocks == 0
    if name == "few blocks":
        assert counters.preemptions > 20
    if name == "wide":
        assert counters.preemptions == 0
