"""An attention tier without a model, for measuring what is in front of it.

Knows AttentionService. A sequence's first token comes at once and the others one a step, all
sequences' tokens in one message, as from the real engine; steps come at a fixed pace and cost next
to nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from moe_core.pb.epserve.v1 import attention_pb2 as pb
from moe_core.pb.epserve.v1 import attention_pb2_grpc


class PacedAttention(attention_pb2_grpc.AttentionServiceServicer):
    def __init__(self, step_s: float, token_ids: Sequence[int]) -> None:
        self.num_tokens = 0  # sent, of all sequences
        self._step_s = step_s
        self._token_ids = token_ids

    async def Serve(self, requests: AsyncIterator[Any], context: Any) -> None:  # noqa: ANN401
        left: dict[str, int] = {}
        writing = asyncio.Lock()
        stepping = asyncio.create_task(self._steps(left, writing, context))
        try:
            async for request in requests:
                if request.HasField("abort"):
                    left.pop(request.abort.sequence_id, None)
                    continue
                sequence_id = request.add.sequence_id
                left[sequence_id] = request.add.sampling.max_tokens
                async with writing:
                    await context.write(self._step(left, [sequence_id]))
        finally:
            stepping.cancel()

    async def _steps(self, left: dict[str, int], writing: asyncio.Lock, context: Any) -> None:  # noqa: ANN401
        while True:
            await asyncio.sleep(self._step_s)
            async with writing:
                if left:
                    await context.write(self._step(left, list(left)))

    def _step(self, left: dict[str, int], sequence_ids: list[str]) -> pb.StepOutput:
        self.num_tokens += len(sequence_ids)
        step = pb.StepOutput()
        for sequence_id in sequence_ids:
            count = left[sequence_id] = left[sequence_id] - 1
            token_id = self._token_ids[count * 7919 % len(self._token_ids)]
            reason = "" if count else "length"
            step.outputs.add(sequence_id=sequence_id, token_ids=[token_id], finish_reason=reason)
            if not count:
                del left[sequence_id]
        return step
