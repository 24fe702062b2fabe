"""Logprobs of prompts against transformers' log_softmax, alone and in batches, over chunk sizes.

support/layouts.py compares them in every layout, attention TP and micro-batches included.
"""

import pytest
import torch

from attn_service import prompt_logprobs
from attn_service.engine import Engine
from attn_service.sequence import Sampling, SequenceRequest, TokenLogprobs
from moe_core.config.parallel import ParallelConfig
from support.layouts import LOGITS_TOLERANCE
from support.local_engine import local_engine
from support.tiny_checkpoints import Checkpoints, Reference

NUM_TOP = 3
LEVEL_2 = ParallelConfig(expert_devices=2, ep_size=2, expert_parallel_degree=2)


async def told(engine: Engine, *references: Reference) -> list[tuple[TokenLogprobs, ...]]:
    """Of prompts that come at once, beside as many that only ask for tokens."""
    stream = engine.sequences.open_stream()
    for index, each in enumerate(references):
        asking = Sampling(max_tokens=index % 2, prompt_logprobs=NUM_TOP)
        stream.add(SequenceRequest(str(index), each.prompt, asking))
        stream.add(SequenceRequest(f"other {index}", each.prompt, Sampling(max_tokens=3)))
    stream.end_of_requests()
    found: dict[str, tuple[TokenLogprobs, ...]] = {}
    async for step in stream.outputs():
        for output in step.outputs:
            assert output.error == ""
            found.setdefault(output.sequence_id, output.prompt_logprobs)
    return [found[str(index)] for index in range(len(references))]


def compare(reference: Reference, entries: tuple[TokenLogprobs, ...]) -> None:
    assert [each.token_id for each in entries] == list(reference.prompt[1:])
    for row, each in zip(reference.prompt_logprobs, entries, strict=True):
        assert each.logprob == pytest.approx(row[each.token_id].item(), abs=LOGITS_TOLERANCE)
        likeliest = row.topk(NUM_TOP).values.tolist()
        assert each.top_logprobs == pytest.approx(likeliest, abs=LOGITS_TOLERANCE)
        for token, logprob in zip(each.top_token_ids, each.top_logprobs, strict=True):
            assert logprob == pytest.approx(row[token].item(), abs=LOGITS_TOLERANCE)


@pytest.mark.parametrize("chunk", [16, 23, 256])
@pytest.mark.parametrize("name", ["deepseek_v3-yarn-qlora", "qwen3_moe-norm"])
async def test_what_is_told_of_a_prompt_is_transformers_log_softmax(
    checkpoints: Checkpoints, name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_logprobs, "LOGITS_BYTES", 10 * 4 * 128)  # ten rows at once
    references = checkpoints.references(name)
    async with local_engine(
        checkpoints.directory(name), LEVEL_2, dtype=torch.float32, max_step_tokens=chunk
    ) as local:
        for reference, entries in zip(
            references, await told(local.engine, *references), strict=True
        ):
            compare(reference, entries)
        for reference in references:  # alone, with a cache that knows all of them
            compare(reference, *await told(local.engine, reference))
