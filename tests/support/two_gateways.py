"""Two gateways of one attention process with a real engine, and the loss of the first.

Knows what the engine generates: steps are let through one by one.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from attn_service.engine import Engine
from attn_service.servicer import AttentionServicer
from moe_core.cluster import Role
from moe_core.pb.epserve.v1 import gateway_pb2 as pb
from support.fake_runner import FakeRunner, continuation
from support.small_engine import running_engine
from support.small_gateway import SmallGateway
from support.words import WORDS, word_tokenizer

DEADLINE_S = 10
PROMPT = (5, 6)
EXPECTED = continuation(PROMPT, 20)


class Turnstile(FakeRunner):
    """Lets so many steps through, and then as many as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = asyncio.Semaphore(0)

    async def execute(self, plan: Any) -> Any:  # noqa: ANN401
        await self.steps.acquire()
        return await super().execute(plan)

    def let(self, steps: int) -> None:
        for _ in range(steps):
            self.steps.release()


def break_links(gateway: SmallGateway) -> None:
    for link in gateway.pool._links.values():
        link._call.cancel()


class Cluster:
    """One attention process that two gateways have joined, each with clients of its own."""

    def __init__(self, engine: Engine, runner: Turnstile, gateways: Sequence[SmallGateway]) -> None:
        self.engine = engine
        self.runner = runner
        self.first, self.second = gateways

    def lose_first(self) -> None:
        """Without a word, as a kill would."""
        break_links(self.first)

    async def until_orphaned(self) -> None:
        """No stream that lives has a sequence any more."""
        async with asyncio.timeout(DEADLINE_S):
            while any(
                each._sequences and not each.is_lost for each in self.engine.sequences._streams
            ):
                await asyncio.sleep(0.005)

    async def received_by_first(self, count: int, **sampling: object) -> list[Any]:
        """The first answers of a request whose gateway is lost when it has so many tokens."""
        self.runner.let(count)
        call = self.first.stub.Generate(message(**sampling), timeout=DEADLINE_S)
        answers = []
        async for answer in call:
            answers.append(answer)
            if len(tokens_of(answers)) >= count:
                break
        self.lose_first()
        await self.until_orphaned()
        return answers


@asynccontextmanager
async def cluster(orphan_grace_s: float = 5.0) -> AsyncIterator[Cluster]:
    runner, tokenizer = Turnstile(), word_tokenizer()
    servicer = AttentionServicer()
    async with (
        running_engine(runner, budget=32, orphan_grace_s=orphan_grace_s) as engine,
        SmallGateway(tokenizer=tokenizer, attn_wait_s=0.0) as first,
        SmallGateway(tokenizer=tokenizer) as second,
    ):
        servicer.lead(engine.sequences)
        for gateway in (first, second):
            await gateway.add_worker(Role.ATTN, servicer)
        yield Cluster(engine, runner, (first, second))
        runner.let(1000)


def message(resume_from: Sequence[int] = (), **sampling: object) -> pb.GenerateRequest:
    # So cold that the runner's favourites are drawn, and yet not greedy: the seed matters.
    settings = {"max_tokens": 20, "temperature": 0.01, "ignore_eos": True, **sampling}
    return pb.GenerateRequest(
        request_id="r1",
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=pb.SamplingParams(**settings),
        resume_from=resume_from,
    )


def tokens_of(answers: Sequence[Any], index: int = 0) -> list[int]:
    return [token for each in answers if each.index == index for token in each.token_ids]


def words_of(token_ids: Sequence[int]) -> str:
    return " ".join(WORDS[token] for token in token_ids)


def text_of(answers: Sequence[Any], index: int = 0) -> str:
    return "".join(each.text for each in answers if each.index == index)
