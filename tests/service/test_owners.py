"""Requests belong to the caller whose API key they came with; to others they are not there."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from gateway.api_keys import ApiKeys, hash_of, new_key
from moe_core.cluster import Role
from moe_core.pb.epserve.v1 import gateway_pb2 as pb
from moe_core.pb.smg import vllm_engine_pb2, vllm_engine_pb2_grpc
from support.fake_attention import FakeAttention
from support.small_gateway import SmallGateway

DEADLINE_S = 10
MINE, OTHERS = new_key(), new_key()


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[SmallGateway]:
    keys = tmp_path / "keys.yaml"
    lines = (("mine", MINE), ("others", OTHERS))
    keys.write_text("".join(f"- {{name: {name}, hash: '{hash_of(key)}'}}\n" for name, key in lines))
    async with SmallGateway(keys=ApiKeys(keys)) as gateway:
        yield gateway


def shown(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def begun(gateway: SmallGateway, key: str) -> tuple[Any, AsyncIterator[Any]]:
    """A request r1 under `key`, and its answers after the first."""
    request = pb.GenerateRequest(request_id="r1", token_ids=pb.TokenIds(ids=[5, 6]))
    call = gateway.stub.Generate(request, timeout=DEADLINE_S, metadata=shown(key))
    answers = aiter(call)
    await anext(answers)
    return call, answers


async def aborted(gateway: SmallGateway, key: str) -> bool:
    request = pb.AbortRequest(request_id="r1")
    answer = await gateway.stub.Abort(request, timeout=DEADLINE_S, metadata=shown(key))
    return bool(answer.found)


async def test_abort_finds_only_what_is_the_callers_own(gateway: SmallGateway) -> None:
    await gateway.add_worker(Role.ATTN, FakeAttention(lambda _: range(40), step_s=0.05))
    _, answers = await begun(gateway, MINE)
    assert not await aborted(gateway, OTHERS)
    vllm = vllm_engine_pb2_grpc.VllmEngineStub(gateway.channel)  # type: ignore[no-untyped-call]
    await vllm.Abort(
        vllm_engine_pb2.AbortRequest(request_ids=["r1"]),
        timeout=DEADLINE_S,
        metadata=shown(OTHERS),
    )
    assert (await anext(answers)).finish_reason == ""
    assert await aborted(gateway, MINE)
    assert [answer async for answer in answers][-1].finish_reason == "abort"


async def test_one_callers_request_id_stands_in_nobody_elses_way(gateway: SmallGateway) -> None:
    fake = FakeAttention(lambda _: range(40), step_s=0.05)
    await gateway.add_worker(Role.ATTN, fake)
    calls = [(await begun(gateway, key))[0] for key in (MINE, OTHERS)]
    owners = [add.sequence_id.removesuffix("/r1/0") for add in fake.added]
    assert len(set(owners)) == 2
    assert not any(name in owner for name in ("mine", "others") for owner in owners)
    with pytest.raises(grpc.aio.AioRpcError, match="such a request is under way"):
        await begun(gateway, MINE)
    for call in calls:
        call.cancel()
