"""What a server answers for methods that fail, and how its health follows what it is told. What it
answers to bytes that do not parse is tests/e2e/test_bad_input.py's, of every method there is.
"""

import sys
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moe_core.errors import UnavailableError
from moe_core.pb.epserve.v1 import gateway_pb2, gateway_pb2_grpc
from moe_core.service import strict_handlers
from moe_core.service.grpc_channel import open_channel
from moe_core.service.grpc_host import GrpcHost

Stub: TypeAlias = gateway_pb2_grpc.GatewayStub
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class Failing(gateway_pb2_grpc.GatewayServicer):
    async def Generate(self, request: object, context: Context) -> AsyncIterator[Any]:
        yield gateway_pb2.GenerateResponse(text="first")
        raise UnavailableError("group 3 is gone")

    # ListModels is left to the generated base class.

    async def Abort(self, request: object, context: Context) -> object:
        raise KeyError("a secret")


@pytest.fixture
async def failing() -> AsyncIterator[Any]:
    host = GrpcHost()
    host.add(gateway_pb2_grpc.add_GatewayServicer_to_server, Failing(), "epserve.v1.Gateway")
    port = await host.start("127.0.0.1", 0)
    async with open_channel(f"127.0.0.1:{port}") as channel:
        yield gateway_pb2_grpc.GatewayStub(channel)
    await host.stop(0)


async def test_error_in_mid_stream_keeps_its_status_and_what_was_sent(
    failing: Stub,
) -> None:
    answers = aiter(failing.Generate(gateway_pb2.GenerateRequest(), timeout=5))
    assert (await anext(answers)).text == "first"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(answers)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "group 3 is gone"


class Recorder:
    """Stands for the module's logger, whose stream an earlier test may have bound for good."""

    def __init__(self) -> None:
        self.exceptions: list[BaseException | None] = []

    def exception(self, event: str, **fields: object) -> None:
        self.exceptions.append(sys.exception())


async def test_unexpected_exception_is_internal_and_told_to_the_log_alone(
    failing: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Recorder()
    monkeypatch.setattr(strict_handlers, "log", log)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await failing.Abort(gateway_pb2.AbortRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "KeyError" not in (caught.value.details() or "")
    assert "secret" not in (caught.value.details() or "")
    (told,) = log.exceptions
    assert isinstance(told, KeyError)
    assert "a secret" in str(told)


async def test_method_that_is_not_there_is_unimplemented(
    failing: Stub,
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await failing.ListModels(gateway_pb2.ListModelsRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "/epserve.v1.Gateway/ListModels is not served here" in (caught.value.details() or "")


async def test_health_follows_set_ready_and_ends_not_serving() -> None:
    host = GrpcHost()
    port = await host.start("127.0.0.1", 0)
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        statuses = aiter(stub.Watch(health_pb2.HealthCheckRequest(), timeout=5))
        assert (await anext(statuses)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        host.set_ready(True)
        assert (await anext(statuses)).status == health_pb2.HealthCheckResponse.SERVING
        host.set_ready(False)
        assert (await anext(statuses)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    await host.stop(0)
