"""AttentionService: the gateway's sequences in, one message of new tokens per step out.

Knows the service's calls, and the sequences that they are about (live_sequences.py). Knows no
scheduling, no model and no message's fields (sequence_messages.py does). The Follow half of the
service is follow.py's, the hand-over of KV blocks kv_handover.py's.

A stream that its gateway ends (no more requests, then the last output) is over. One that breaks is
lost: its sequences run on for a while, see engine_stream.py.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from attn_service.engine_stream import EngineStream
from attn_service.follow import Followers
from attn_service.group_kv import fetch_blocks
from attn_service.kv_handover import KvHandover
from attn_service.live_sequences import LiveSequences
from attn_service.sequence import FinishReason, SequenceOutput
from attn_service.sequence_messages import output_to_pb, request_from_pb
from moe_core.errors import EpserveError, RequestError, UnavailableError
from moe_core.pb.epserve.v1 import attention_pb2 as pb
from moe_core.pb.epserve.v1 import attention_pb2_grpc as pb_grpc

SERVICE_NAME = "epserve.v1.AttentionService"
MAX_FOUND = 64  # the most choices that a request has
add_to_server = pb_grpc.add_AttentionServiceServicer_to_server


class AttentionServicer(pb_grpc.AttentionServiceServicer):
    """Answers UNAVAILABLE until it is told what this rank does: a server must have its port, and
    so its servicers, before the process knows its rank."""

    def __init__(self) -> None:
        self._sequences: LiveSequences | None = None
        self._followers: Followers | None = None
        self._handover: KvHandover | None = None
        self._leader_epoch: int | None = None
        self._otherwise: EpserveError = UnavailableError("this attention process is starting")

    def lead(self, sequences: LiveSequences) -> None:
        """Serve what comes with `sequences`. Who is to follow has been accepted before."""
        self._sequences = sequences
        self._otherwise = RequestError("this attention process is alone in its group: none follow")

    def accept(self, followers: Followers) -> None:
        """Let the other ranks of the group follow."""
        self._followers = followers

    def follow(self, reason: str, leader_instance_epoch: int) -> None:
        """Refuse what is tp_rank 0's to answer, and do what that one asks for."""
        self._otherwise = RequestError(reason)
        self._leader_epoch = leader_instance_epoch

    def hand_over(self, handover: KvHandover) -> None:
        """Give and fetch KV blocks with it."""
        self._handover = handover

    async def Serve(self, request_iterator: AsyncIterator[Any], context: Any) -> None:  # noqa: ANN401
        if self._sequences is None:
            raise self._otherwise
        stream = self._sequences.open_stream()
        reading = asyncio.create_task(_read(request_iterator, stream), name="serve-requests")
        try:
            async for output in stream.outputs():
                await context.write(output_to_pb(output))
            if not stream.is_lost:
                stream.close()
        finally:
            stream.lose()
            reading.cancel()
            await asyncio.wait({reading})
        if not reading.cancelled():
            reading.result()

    async def Find(self, request: Any, context: Any) -> Any:  # noqa: ANN401
        if self._sequences is None:
            raise self._otherwise
        if len(request.sequence_ids) > MAX_FOUND:
            raise RequestError(
                f"sequence_ids: at most {MAX_FOUND} ids, not {len(request.sequence_ids)}"
            )
        known = map(self._sequences.find, request.sequence_ids)
        return pb.FindResponse(
            sequences=[
                pb.FoundSequence(
                    sequence_id=each.sequence.request.sequence_id,
                    seed=each.sequence.request.sampling.seed,
                )
                for each in known
                if each is not None
            ]
        )

    async def Handover(self, request_iterator: AsyncIterator[Any], context: Any) -> None:  # noqa: ANN401
        if self._handover is None:
            raise self._otherwise
        await self._handover.servicer.Handover(request_iterator, context)

    async def FetchBlocks(self, request: Any, context: Any) -> Any:  # noqa: ANN401
        if self._handover is None or self._leader_epoch is None:
            raise RequestError("this attention process follows nobody")
        return await fetch_blocks(self._handover, self._leader_epoch, request)

    async def Follow(self, request_iterator: AsyncIterator[Any], context: Any) -> None:  # noqa: ANN401
        if self._followers is None:
            raise self._otherwise
        await self._followers.serve(request_iterator, context)


async def _read(requests: AsyncIterator[Any], stream: EngineStream) -> None:
    try:
        async for request in requests:
            _take(request, stream)
    except EpserveError:
        stream.close()  # what is malformed ends now, not after its sequences
        raise
    except BaseException:
        stream.lose()
        raise
    stream.end_of_requests()


def _take(request: Any, stream: EngineStream) -> None:  # noqa: ANN401
    match request.WhichOneof("kind"):
        case "add":
            try:
                stream.add(request_from_pb(request.add))
            except EpserveError as error:
                stream.refuse(_refusal(request.add.sequence_id, error))
        case "abort":
            stream.abort(request.abort.sequence_id)
        case "park":
            stream.park(request.park.sequence_id)
        case _:
            raise RequestError("EngineRequest: none of add, abort and park is set")


def _refusal(sequence_id: str, error: EpserveError) -> SequenceOutput:
    return SequenceOutput(
        sequence_id,
        finish_reason=FinishReason.ERROR,
        error_code=error.code,
        error=str(error),
        go_elsewhere=isinstance(error, UnavailableError),
    )
