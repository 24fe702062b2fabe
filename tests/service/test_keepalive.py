"""A frozen process is told from a busy one: the first loses its streams, the second does not."""

from collections.abc import Iterator

import grpc
import grpc.aio
import pytest

from moe_core.service.grpc_channel import open_channel
from support.blocked_server import PATH, BlockedServer

NOTICED_S = 4.0  # 3 are promised, and the machine may be busy
DEADLINE_S = 30.0


@pytest.fixture
def server() -> Iterator[BlockedServer]:
    with BlockedServer() as server:
        yield server


@pytest.mark.parametrize("way", ["holding the GIL", "in torch"])
async def test_a_busy_event_loop_keeps_its_streams(server: BlockedServer, way: str) -> None:
    async with open_channel(server.address) as channel:
        call = channel.unary_stream(PATH)(way.encode(), timeout=DEADLINE_S)
        assert [answer async for answer in call] == [b"begun", b"done"]


async def test_the_streams_of_a_stopped_process_end(server: BlockedServer) -> None:
    async with open_channel(server.address) as channel:
        call = channel.unary_stream(PATH)(b"stopped", timeout=NOTICED_S)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [answer async for answer in call]
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
