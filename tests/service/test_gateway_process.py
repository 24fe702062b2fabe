"""The gateway as its process wires it, with the bundled model and workers without one."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.process import GatewayService
from gateway.settings import GatewaySettings
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.cluster import Role
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ConfigError
from moe_core.pb.epserve.v1 import gateway_pb2 as pb
from moe_core.pb.epserve.v1 import gateway_pb2_grpc
from moe_core.service.cluster_codec import cluster_from_pb
from moe_core.service.grpc_channel import open_channel
from support.fake_attention import FakeAttention, FakeWorker

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "epserve" / "tiny_model"
PARALLEL = ParallelConfig(attn_devices=2, dp_size=2, expert_devices=1)
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayService]:
    service = GatewayService(GatewaySettings(MODEL, "127.0.0.1", 0, PARALLEL, "tiny"))
    await service.startup()
    serving = asyncio.create_task(service.serve())
    yield service
    async with asyncio.timeout(10):
        await service.drain()
    serving.cancel()
    await asyncio.wait({serving})


@pytest.fixture
async def channel(gateway: GatewayService) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(f"127.0.0.1:{gateway.port}") as channel:
        yield channel


async def next_status(statuses: AsyncIterator[Any], expected: int) -> None:
    async with asyncio.timeout(10):
        while (await anext(statuses)).status != expected:
            pass


async def test_gateway_serves_once_both_tiers_are_ready(
    gateway: GatewayService, channel: grpc.aio.Channel
) -> None:
    address, digest = f"127.0.0.1:{gateway.port}", Checkpoint.open(MODEL).fingerprint()
    stub: Any = health_pb2_grpc.HealthStub(channel)
    statuses = aiter(stub.Watch(health_pb2.HealthCheckRequest(), timeout=30))
    await next_status(statuses, NOT_SERVING)
    fake = FakeAttention(lambda prompt: [7, 8])
    workers = [FakeWorker(address, digest, role) for role in (Role.ATTN, Role.EXPERT, Role.ATTN)]
    for worker in workers[:2]:
        await worker.start(fake)
    check = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert check.status == NOT_SERVING
    await workers[2].start(fake)
    await next_status(statuses, SERVING)
    public: Any = gateway_pb2_grpc.GatewayStub(channel)
    request = pb.GenerateRequest(model="tiny", text="once upon a time")
    answers = [answer async for answer in public.Generate(request, timeout=10)]
    assert [token for answer in answers for token in answer.token_ids] == [7, 8]
    state = cluster_from_pb(await public.GetCluster(pb.GetClusterRequest(), timeout=5))
    (itself,) = state.tier(Role.GATEWAY)
    assert (itself.address, str(itself.state), itself.detail) == (address, "ready", "")
    await workers[0].stop()  # one group is left, which is enough to serve
    check = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert check.status == SERVING
    await workers[1].stop()
    await next_status(statuses, NOT_SERVING)
    state = cluster_from_pb(await public.GetCluster(pb.GetClusterRequest(), timeout=5))
    (itself,) = state.tier(Role.GATEWAY)
    assert str(itself.state) == "connecting"
    assert itself.detail == "attn 0: not joined; expert 0: not joined"
    await workers[2].stop()


async def test_http_is_ready_with_grpc_and_drains_with_it(gateway: GatewayService) -> None:
    address, digest = f"127.0.0.1:{gateway.port}", Checkpoint.open(MODEL).fingerprint()
    fake = FakeAttention(lambda prompt: [7, 8], step_s=0.2)
    workers = [FakeWorker(address, digest, role) for role in (Role.ATTN, Role.EXPERT, Role.ATTN)]
    url = f"http://127.0.0.1:{gateway.http_port}"
    async with httpx2.AsyncClient(base_url=url, timeout=10) as client:
        assert (await client.get("/ready")).status_code == 503
        for worker in workers:
            await worker.start(fake)
        async with asyncio.timeout(10):
            while (await client.get("/ready")).status_code != 200:
                await asyncio.sleep(0.02)
        body = {"prompt": "once upon a time", "stream": True}
        asked = asyncio.create_task(client.post("/v1/completions", json=body))
        while not fake.added:
            await asyncio.sleep(0.01)
        draining = asyncio.create_task(gateway.drain())
        await asyncio.sleep(0)
        assert (await client.get("/ready")).json()["missing"] == ["the gateway, which is draining"]
        assert (await client.post("/v1/completions", json=body)).status_code == 503
        await workers[1].stop()  # the experts go and come: it is not ready again for that
        workers[1] = FakeWorker(address, digest, Role.EXPERT)
        await workers[1].start()
        await asyncio.sleep(0.1)
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200
        assert (await asked).text.endswith("data: [DONE]\n\n")
        await draining
    for worker in workers:
        await worker.stop()


async def test_a_layout_that_the_model_does_not_allow_is_refused() -> None:
    service = GatewayService(
        GatewaySettings(MODEL, "127.0.0.1", 0, ParallelConfig(attn_devices=64))
    )
    with pytest.raises(ConfigError, match="num_attention_heads"):
        await service.startup()
    await service.drain()


def test_gateway_process_never_imports_torch() -> None:
    code = (
        "import sys, asyncio\n"
        "from pathlib import Path\n"
        "from gateway.process import GatewayService\n"
        "from gateway.settings import GatewaySettings\n"
        "from moe_core.config.parallel import ParallelConfig\n"
        "async def main():\n"
        f"    settings = GatewaySettings(Path({str(MODEL)!r}), '127.0.0.1', 0, ParallelConfig())\n"
        "    service = GatewayService(settings)\n"
        "    await service.startup()\n"
        "    await service.drain()\n"
        "asyncio.run(main())\n"
        "print([name for name in ('torch', 'transformers', 'nixl') if name in sys.modules])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.stdout.splitlines()[-1:] == ["[]"], run.stderr
