"""An attention end in a process of its own: `python -m support.exchange_driver ADDRESS TRANSPORT
COUNT` makes COUNT loaded dispatches, checks every answer and prints as JSON its link's counters and
what it wrote to the stream."""

import asyncio
import dataclasses
import json
import sys

import torch
import uvloop

from support.exchange_ends import SPEC, answer_to, connect, make_dispatch
from support.stream_messages import written_messages

LANES = 3  # as many as there are slots


async def main(address: str, transport: str, count: int) -> None:
    link = await connect(address, SPEC, transport)

    async def lane(first: int) -> None:
        for step in range(first, count, LANES):
            dispatch = make_dispatch(SPEC.slot_tokens, SPEC, step=step)
            pending = await link.dispatch(dispatch, 10.0)
            if not torch.equal((await pending.wait(10.0)).partial, answer_to(dispatch)):
                raise SystemExit(f"dispatch {step} came back with other values")
            pending.release()

    with written_messages() as kinds:
        await asyncio.gather(*(lane(first) for first in range(LANES)))
    await link.close()
    counters = dataclasses.asdict(link.counters)
    print(json.dumps({"transport": link.transport, "written": kinds, **counters}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
