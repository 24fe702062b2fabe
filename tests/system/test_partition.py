"""An expert process whose packets are dropped, as behind a switch that has failed."""

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from epserve.client import EpserveClient
from epserve.generate_messages import Sampling
from moe_core.cluster import MemberState, Role
from moe_core.errors import EpserveError
from support.namespaces import HERE_IP, THERE_IP, OtherHost, other_host
from support.processes import TINY_MODEL, started

MODEL = ("--model", str(TINY_MODEL))
NOTICED_S = 4.0  # three seconds, and one for a busy machine
BACK_S = 60.0
LONG = Sampling(max_tokens=300, temperature=0.0, ignore_eos=True)
PROMPT = (5, 6, 7)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HERE_IP, 0))
        return probe.getsockname()[1]


@pytest.fixture
def cluster() -> Iterator[tuple[OtherHost, str]]:
    """Gateway and attention here, the expert process on the other host."""
    with ExitStack() as stack:
        there = stack.enter_context(other_host())
        target = f"{HERE_IP}:{free_port()}"
        port = target.rpartition(":")[2]
        ports = ("--grpc-port", port, "--port", "0")
        here = ("--host", HERE_IP, "--insecure")
        settings = ("--device", "cpu", "--dtype", "float64", "--threads", "1")
        worker = (*MODEL, "--gateway", target, *settings)
        gateway = stack.enter_context(started("gateway", *MODEL, *here, *ports))
        cache = ("--kv-cache-tokens", "1024")
        stack.enter_context(started("attn", *worker, *here, *cache, "--transport", "grpc"))
        stack.enter_context(
            started(
                *("expert", *worker, "--host", THERE_IP, "--insecure", "--transport", "grpc"),
                wrapper=there.wrapper,
            )
        )
        gateway.wait_for("event='ready'")
        yield there, target


async def tokens(client: EpserveClient) -> list[int]:
    return [token async for output in client.generate(PROMPT, LONG) for token in output.token_ids]


async def test_a_short_partition_delays_and_changes_no_token(cluster: tuple[OtherHost, str]):
    there, target = cluster
    async with EpserveClient(target) as client:
        quiet = await tokens(client)
        disturbed = asyncio.create_task(tokens(client))
        await asyncio.sleep(0.2)
        with there.cut_off():
            await asyncio.sleep(0.8)
            assert not disturbed.done()
        assert await disturbed == quiet


async def test_a_partition_is_noticed_and_the_cluster_serves_as_before_when_it_heals(
    cluster: tuple[OtherHost, str],
):
    there, target = cluster
    async with EpserveClient(target) as client:
        quiet = await tokens(client)
        disturbed = asyncio.create_task(tokens(client))
        await asyncio.sleep(0.2)
        with there.cut_off():
            began = time.monotonic()
            while await _is_ready(client):
                assert time.monotonic() < began + NOTICED_S
                await asyncio.sleep(0.1)
            async with asyncio.timeout(60):
                await asyncio.wait([disturbed])
        error = disturbed.exception()
        assert error is None or isinstance(error, EpserveError)
        assert error is not None or disturbed.result() == quiet
        async with asyncio.timeout(BACK_S):
            while not (await _is_ready(client) and await _is_complete(client)):
                await asyncio.sleep(0.1)
        assert await tokens(client) == quiet


async def _is_ready(client: EpserveClient) -> bool:
    tier = (await client.cluster()).tier(Role.EXPERT)
    return any(member.state is MemberState.READY for member in tier)


async def _is_complete(client: EpserveClient) -> bool:
    """The attention process has a link to the expert process again."""
    tier = (await client.cluster()).tier(Role.ATTN)
    return [(member.state, member.detail) for member in tier] == [(MemberState.READY, "")]
