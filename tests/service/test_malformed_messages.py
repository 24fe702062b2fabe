"""Every method of every epserve service answers bytes that do not parse with a clean status."""

from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from gateway.admission import ServedModel
from gateway.attention_pool import AttentionPool
from gateway.cluster_servicer import ClusterServicer
from gateway.generation import Generator
from gateway.servicer import GatewayServicer
from moe_core.errors import ConfigError, UnavailableError
from moe_core.pb.epserve.v1 import (
    attention_pb2,
    attention_pb2_grpc,
    cluster_pb2,
    expert_pb2,
    expert_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
)
from moe_core.service.grpc_channel import open_channel
from moe_core.service.grpc_host import GrpcHost
from support.fake_attention import FakeAttention
from support.moe_configs import moe_model
from support.small_gateway import make_registry

Stub: TypeAlias = gateway_pb2_grpc.GatewayStub
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
GARBAGE = b"\xff\xff\xff not protobuf"
PROTOS = (attention_pb2, cluster_pb2, expert_pb2, gateway_pb2, health_pb2, reflection_pb2)
METHODS = [
    method
    for proto in PROTOS
    for service in proto.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


class EchoingExchange(expert_pb2_grpc.ExpertServiceServicer):
    async def Exchange(self, requests: AsyncIterator[Any], context: Context) -> None:
        while await context.read() is not grpc.aio.EOF:
            await context.write(expert_pb2.ExchangeResponse())


class Following(FakeAttention):
    async def Follow(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async for _ in requests:
            yield attention_pb2.StepPlan()


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    registry = make_registry()
    pool = AttentionPool()
    generator = Generator(ServedModel("m", moe_model(), None), registry, pool)
    host = GrpcHost()
    GatewayServicer(generator, registry).add_to(host)
    ClusterServicer(registry).add_to(host)
    host.add(
        attention_pb2_grpc.add_AttentionServiceServicer_to_server,
        Following(lambda prompt: prompt),
        "epserve.v1.AttentionService",
    )
    host.add(
        expert_pb2_grpc.add_ExpertServiceServicer_to_server,
        EchoingExchange(),
        "epserve.v1.ExpertService",
    )
    port = await host.start("127.0.0.1", 0)
    async with open_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await host.stop(0)


async def send(channel: grpc.aio.Channel, method: MethodDescriptor, data: bytes) -> list[bytes]:
    path = f"/{method.containing_service.full_name}/{method.name}"
    if method.client_streaming:
        call: Any = channel.stream_stream(path)(iter([data]), timeout=5)
    elif method.server_streaming:
        call = channel.unary_stream(path)(data, timeout=5)
    else:
        return [await channel.unary_unary(path)(data, timeout=5)]
    return [answer async for answer in call]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
async def test_garbage_is_an_invalid_argument_that_names_the_message_type(
    channel: grpc.aio.Channel, method: MethodDescriptor
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await send(channel, method, GARBAGE)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()
    details = caught.value.details() or ""
    assert method.input_type.full_name in details
    for leak in ("Error", "class", "Traceback", "_pb2", "google."):
        assert leak not in details


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


async def test_unexpected_exception_is_internal_and_tells_nothing(
    failing: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await failing.Abort(gateway_pb2.AbortRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "KeyError" not in (caught.value.details() or "")
    assert "secret" not in (caught.value.details() or "")
    assert "a secret" in "".join(capsys.readouterr())


async def test_method_that_is_not_there_is_unimplemented(
    failing: Stub,
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await failing.ListModels(gateway_pb2.ListModelsRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "/epserve.v1.Gateway/ListModels is not served here" in (caught.value.details() or "")


async def test_port_in_use_is_a_config_error_naming_it() -> None:
    first, second = GrpcHost(), GrpcHost()
    port = await first.start("127.0.0.1", 0)
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*in use"):
        await second.start("127.0.0.1", port)
    await first.stop(0)


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


async def test_reflection_lists_what_is_served(channel: grpc.aio.Channel) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    method = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].methods[0]
    (answer,) = await send(channel, method, request.SerializeToString())
    response = reflection_pb2.ServerReflectionResponse.FromString(answer)
    names = {service.name for service in response.list_services_response.service}
    assert {"epserve.v1.Gateway", "epserve.v1.ClusterService", "grpc.health.v1.Health"} <= names
