"""What the engine hands to the sampler and puts out of it, and that a resumed sequence goes on."""

import pytest
import torch

from attn_service.sequence import Sampling, SequenceOutput, SequenceRequest
from moe_core.errors import RequestError
from support import plain_sampler
from support.fake_runner import VOCAB, FakeRunner, continuation, next_token
from support.small_engine import outputs_of, running_engine

PROMPT = (3, 9, 3, 27)
ALL_KINDS = {
    "penalties": Sampling(
        max_tokens=24,
        temperature=1.0,
        seed=5,
        repetition_penalty=1.4,
        presence_penalty=0.8,
        frequency_penalty=0.6,
    ),
    "greedy penalties": Sampling(max_tokens=24, presence_penalty=0.75, frequency_penalty=0.5),
    "min_tokens": Sampling(
        max_tokens=24, temperature=1.5, seed=6, min_tokens=15, stop_token_ids=frozenset(range(10))
    ),
    "filters": Sampling(max_tokens=24, temperature=2.0, seed=7, top_k=9, top_p=0.8),
}


def tokens_of(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def expected_tokens(sampling: Sampling) -> list[int]:
    """By the plain formulas on FakeRunner's logits."""
    outputs: list[int] = []
    while len(outputs) < sampling.max_tokens:
        logits = [0.0] * VOCAB
        logits[next_token([*PROMPT, *outputs])] = 1.0
        token, _ = plain_sampler.next_token(logits, sampling, PROMPT, outputs)
        outputs.append(token)
        if token in sampling.stop_token_ids:
            break
    return outputs


@pytest.mark.parametrize("kind", ALL_KINDS)
async def test_every_sequence_of_a_mixed_batch_gets_the_plain_formulas_tokens(kind: str) -> None:
    async with running_engine(FakeRunner()) as engine:
        requests = [SequenceRequest(name, PROMPT, s) for name, s in ALL_KINDS.items()]
        outputs = await outputs_of(engine, *requests)
    assert tokens_of(outputs[kind]) == expected_tokens(ALL_KINDS[kind])
    assert kind != "min_tokens" or outputs[kind][-1].finish_reason == "stop"


@pytest.mark.parametrize("kind", ALL_KINDS)
async def test_a_sequence_that_is_resumed_elsewhere_goes_on_with_the_same_tokens(kind: str) -> None:
    sampling = ALL_KINDS[kind]
    async with running_engine(FakeRunner()) as engine:
        whole = (await outputs_of(engine, SequenceRequest("whole", PROMPT, sampling)))["whole"]
    tokens = tokens_of(whole)
    for count in (1, 7, len(tokens) - 1):
        async with running_engine(FakeRunner()) as elsewhere:
            request = SequenceRequest("rest", PROMPT, sampling, output_ids=tuple(tokens[:count]))
            rest = (await outputs_of(elsewhere, request))["rest"]
        assert tokens_of(rest) == tokens[count:]
        assert rest[-1].finish_reason == whole[-1].finish_reason


async def test_what_can_not_be_resumed_is_refused_with_the_numbers() -> None:
    async with running_engine(FakeRunner()) as engine:
        stream = engine.sequences.open_stream()
        done = SequenceRequest("s", PROMPT, Sampling(max_tokens=2), output_ids=(4, 5))
        with pytest.raises(RequestError, match="2 tokens have been generated already"):
            stream.add(done)
        wrong = SequenceRequest("s", PROMPT, Sampling(max_tokens=9, logit_bias=((VOCAB, 1.0),)))
        with pytest.raises(RequestError, match="logit_bias: token id 32"):
            stream.add(wrong)


async def test_logprobs_are_those_of_the_raw_logits_for_sequences_that_ask() -> None:
    asked = Sampling(max_tokens=4, logprobs=2, logit_bias=((8, 50.0),))
    async with running_engine(FakeRunner()) as engine:
        outputs = await outputs_of(
            engine,
            SequenceRequest("asked", PROMPT, asked),
            SequenceRequest("not", PROMPT, Sampling(max_tokens=4)),
        )
    assert tokens_of(outputs["not"]) == continuation(PROMPT, 4)
    assert [output.logprobs for output in outputs["not"]] == [()] * 4
    assert tokens_of(outputs["asked"]) == [8] * 4
    logits = torch.zeros(VOCAB)
    logits[next_token(list(PROMPT))] = 1.0
    expected = logits.log_softmax(-1)
    (first,) = outputs["asked"][0].logprobs
    assert (first.token_id, first.rank) == (8, 2)
    assert first.logprob == pytest.approx(expected[8].item(), abs=1e-6)
    assert first.top_token_ids == (next_token(list(PROMPT)), 0)
    assert first.top_logprobs == pytest.approx(
        [expected.max().item(), expected[8].item()], abs=1e-6
    )
