"""Sampling settings from the public interface to a real engine and back, over real gRPC: only
the model is missing."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

from attn_service.sequence import Sampling
from attn_service.servicer import AttentionServicer
from moe_core.cluster import Role
from moe_core.pb.epserve.v1 import gateway_pb2 as pb
from support import plain_sampler
from support.fake_runner import VOCAB, FakeRunner, next_token
from support.small_engine import running_engine
from support.small_gateway import SmallGateway
from support.words import WORDS, word_tokenizer

DEADLINE_S = 20
PROMPT = (5, 6, 5)
SEED = 2**63 + 11


@pytest.fixture
async def gateway() -> AsyncIterator[SmallGateway]:
    servicer = AttentionServicer()
    async with (
        running_engine(FakeRunner(), budget=16, max_num_seqs=8) as engine,
        SmallGateway(tokenizer=word_tokenizer()) as gateway,
    ):
        servicer.lead(engine.sequences)
        await gateway.add_worker(Role.ATTN, servicer)
        yield gateway


async def choices(gateway: SmallGateway, **sampling: object) -> dict[int, list[Any]]:
    """Of each choice, its answers."""
    message = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=pb.SamplingParams(**{"seed": SEED, "max_tokens": 12, **sampling}),
    )
    found: dict[int, list[Any]] = {}
    async for answer in gateway.stub.Generate(message, timeout=DEADLINE_S):
        found.setdefault(answer.index, []).append(answer)
    return found


def tokens_of(answers: list[Any]) -> list[int]:
    return [token for answer in answers for token in answer.token_ids]


def logits_after(outputs: list[int]) -> list[float]:
    """FakeRunner's."""
    logits = [0.0] * VOCAB
    logits[next_token([*PROMPT, *outputs])] = 1.0
    return logits


def float32(value: float) -> float:
    """As it arrives at the engine."""
    return torch.tensor(value, dtype=torch.float32).item()


def expected(index: int = 0, **changes: Any) -> list[int]:  # noqa: ANN401
    sampling = Sampling(**{"max_tokens": 12, "seed": SEED, "index": index, **changes})
    outputs: list[int] = []
    while len(outputs) < 12 and (not outputs or outputs[-1] not in sampling.stop_token_ids):
        token, _ = plain_sampler.next_token(logits_after(outputs), sampling, PROMPT, outputs)
        outputs.append(token)
    return outputs


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.5},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.75, "min_p": 0.25},
        {"temperature": 0.0, "repetition_penalty": 4.0, "frequency_penalty": 0.75},
        {"temperature": 0.0, "presence_penalty": 1.7},
        {"temperature": 1.0, "presence_penalty": -2.0, "frequency_penalty": 0.5},
    ],
)
async def test_tokens_are_those_of_the_plain_formulas(
    gateway: SmallGateway, settings: dict[str, float]
) -> None:
    answers = (await choices(gateway, ignore_eos=True, **settings))[0]
    as_sent = {
        name: value if isinstance(value, int) else float32(value)
        for name, value in settings.items()
    }
    assert tokens_of(answers) == expected(**as_sent)
    assert answers[-1].finish_reason == "length"


async def test_logit_bias_reaches_the_sampler(gateway: SmallGateway) -> None:
    answers = (await choices(gateway, temperature=0.0, logit_bias={9: 100.0}))[0]
    assert tokens_of(answers) == [9] * 12
    assert "".join(answer.text for answer in answers) == " ".join([WORDS[9]] * 12)


async def test_min_tokens_keeps_stop_tokens_away(gateway: SmallGateway) -> None:
    settings = {"temperature": 1.0, "min_tokens": 6, "stop_token_ids": range(2, 30)}
    answers = (await choices(gateway, **settings))[0]
    tokens = tokens_of(answers)
    stops = frozenset({1, *range(2, 30)})
    assert tokens == expected(temperature=1.0, min_tokens=6, stop_token_ids=stops)
    assert len(tokens) > 6
    assert answers[-1].finish_reason == "stop"


async def test_choices_differ_and_each_is_what_its_index_draws(gateway: SmallGateway) -> None:
    found = await choices(gateway, temperature=2.0, n=4, ignore_eos=True, presence_penalty=1.0)
    assert {index: tokens_of(answers) for index, answers in found.items()} == {
        index: expected(index, temperature=2.0, presence_penalty=1.0) for index in range(4)
    }
    assert len({tuple(tokens_of(answers)) for answers in found.values()}) == 4


@pytest.mark.parametrize("count", [0, 3])
async def test_logprobs_come_with_every_token(gateway: SmallGateway, count: int) -> None:
    answers = (
        await choices(gateway, temperature=2.0, logprobs=count, ignore_eos=True, min_tokens=12)
    )[0]
    tokens = tokens_of(answers)
    told = [each for answer in answers for each in answer.logprobs]
    assert [each.token_id for each in told] == tokens
    assert all(len(answer.logprobs) == len(answer.token_ids) for answer in answers)
    for position, each in enumerate(told):
        logits = torch.tensor(logits_after(tokens[:position]))
        expected_logprobs = logits.log_softmax(-1)
        assert each.logprob == pytest.approx(expected_logprobs[each.token_id].item(), abs=2e-6)
        assert each.rank == (1 if logits[each.token_id] == 1 else 2)
        best = int(logits.argmax())
        others = [token for token in range(VOCAB) if token != best]
        assert list(each.top_token_ids) == [best, *others][:count]
        assert list(each.top_logprobs) == pytest.approx(
            expected_logprobs[list(each.top_token_ids)].tolist(), abs=2e-6
        )


async def test_without_logprobs_none_are_told(gateway: SmallGateway) -> None:
    answers = (await choices(gateway))[0]
    assert not any(answer.logprobs for answer in answers)
