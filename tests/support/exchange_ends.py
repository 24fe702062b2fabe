"""Both ends of an exchange for the contract tests: a handler whose answer depends on every input,
and links to it over each transport. The layer says how the handler behaves."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import torch

from moe_core.errors import UnavailableError
from moe_core.pb.epserve.v1 import expert_pb2_grpc as rpc
from moe_core.service.certificates import Certificates
from moe_core.service.grpc_host import GrpcHost
from moe_core.transport.base import (
    Dispatch,
    DispatchHandler,
    DispatchKey,
    ExpertLink,
    Identity,
    LinkSpec,
    Reply,
    TransportOptions,
)
from moe_core.transport.connect import connect_link
from moe_core.transport.local import LocalLink
from moe_core.transport.servicer import ExchangeServicer

SERVICE = "epserve.v1.ExpertService"
ANSWER, FAIL, SILENT, LATE, CRASH, FREEZE = range(6)  # layers
LATE_S = 0.3
ATTENTION = Identity(rank=0, world=4, instance_epoch=11)
EXPERT = Identity(rank=1, world=4, instance_epoch=22)
PEER = Identity(rank=1, world=4, instance_epoch=0)


def spec_of(dtype: torch.dtype = torch.float32) -> LinkSpec:
    return LinkSpec("fingerprint", dtype, 24, 3, 8, 3)


SPEC = spec_of()


def answer_to(dispatch: Dispatch) -> torch.Tensor:
    """Different for every row, expert id and weight; the same bits wherever it is computed."""
    scale = (dispatch.physical_ids * dispatch.topk_weights).sum(1, keepdim=True)
    return dispatch.hidden_states * scale.to(dispatch.hidden_states.dtype)


def behave(dispatch: Dispatch, reply: Reply) -> None:
    layer = dispatch.key.layer_id
    if layer == FAIL:
        reply.fail(UnavailableError("expert 17 has gone for lunch"))
    elif layer == LATE:
        partial = answer_to(dispatch)
        asyncio.get_running_loop().call_later(LATE_S, reply.complete, partial, 5, 6)
    elif layer == CRASH:
        raise ZeroDivisionError("a mistake in the handler")
    elif layer == FREEZE:  # and answer when it thaws, before it hears of anything else
        os.kill(os.getpid(), signal.SIGSTOP)
        reply.complete(answer_to(dispatch), 3, 4)
    elif layer != SILENT:
        reply.complete(answer_to(dispatch), 3, 4)


def make_dispatch(
    num_tokens: int, spec: LinkSpec, *, layer: int = ANSWER, step: int = 0
) -> Dispatch:
    seeded = torch.Generator().manual_seed(1000 * step + num_tokens)
    shape = (num_tokens, spec.num_columns)
    return Dispatch(
        DispatchKey(placement_epoch=5, step=step, layer_id=layer),
        torch.randn(num_tokens, spec.hidden_size, generator=seeded, dtype=torch.float64).to(
            spec.dtype
        ),
        torch.randint(-1, 9, shape, generator=seeded, dtype=torch.int32),
        torch.rand(shape, generator=seeded),
    )


@dataclass
class Expert:
    """An expert end in this process: serves every LinkSpec it was opened with on one port."""

    servicer: ExchangeServicer
    address: str


@asynccontextmanager
async def serve(
    spec: LinkSpec,
    transport: str = "auto",
    handler: DispatchHandler = behave,
    identity: Identity = EXPERT,
    port: int = 0,
    host: str = "127.0.0.1",
    attention_world: Callable[[], int] | None = None,
    tls: Certificates | None = None,
) -> AsyncIterator[Expert]:
    options = TransportOptions(transport)
    servicer = ExchangeServicer(handler, spec, identity, options, attention_world)
    server = GrpcHost(tls)
    server.add(rpc.add_ExpertServiceServicer_to_server, servicer, SERVICE)
    bound = await server.start(host, port)
    try:
        yield Expert(servicer, f"{host}:{bound}")
    finally:
        await servicer.close()
        await server.stop(0.0)


async def connect(
    address: str, spec: LinkSpec, transport: str, identity: Identity = ATTENTION
) -> ExpertLink:
    return await connect_link(address, spec, identity, PEER, TransportOptions(transport))


@dataclass
class Ends:
    """One transport; makes links of any spec and takes them down again."""

    transport: str
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def link(self, spec: LinkSpec, handler: DispatchHandler = behave) -> ExpertLink:
        return (await self.links(spec, 1, handler))[0]

    async def links(
        self, spec: LinkSpec, count: int, handler: DispatchHandler = behave
    ) -> list[ExpertLink]:
        """`count` attention processes on one expert process."""
        links: list[ExpertLink] = []
        if self.transport == "local":
            links += (LocalLink(handler, spec) for _ in range(count))
        else:
            expert = await self.stack.enter_async_context(serve(spec, self.transport, handler))
            for rank in range(count):
                who = Identity(rank, 4, 100 + rank)
                links.append(await connect(expert.address, spec, self.transport, who))
        for link in links:
            self.stack.push_async_callback(link.close)
        return links


async def round_trip(link: ExpertLink, dispatch: Dispatch) -> torch.Tensor:
    pending = await link.dispatch(dispatch, 5.0)
    combine = await pending.wait(5.0)
    assert combine.key == dispatch.key
    partial = combine.partial.clone()
    pending.release()
    return partial


async def until(condition, timeout_s: float = 5.0) -> None:  # noqa: ANN001
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
