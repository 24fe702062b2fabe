"""A process that asks an attention process for sequences as a gateway does, for a test to kill.

Run as `python lost_gateway.py HOST:PORT NAME …`; it prints the number of tokens as they come.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

from moe_core.pb.epserve.v1 import attention_pb2 as pb
from moe_core.pb.epserve.v1.attention_pb2_grpc import AttentionServiceStub
from moe_core.service.grpc_channel import open_channel


async def _requests(names: Sequence[str]) -> AsyncIterator[pb.EngineRequest]:
    sampling = pb.EngineSampling(max_tokens=40, top_p=1.0)
    for name in names:
        add = pb.AddSequence(sequence_id=name, prompt_ids=[1, 2, 3], sampling=sampling)
        yield pb.EngineRequest(add=add)
    await asyncio.Event().wait()


async def main(address: str, names: Sequence[str]) -> None:
    async with open_channel(address) as channel:
        stub: Any = AttentionServiceStub(channel)  # type: ignore[no-untyped-call]  # generated
        async for step in stub.Serve(_requests(names)):
            print(sum(len(output.token_ids) for output in step.outputs), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
