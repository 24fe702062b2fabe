"""An attention worker without a model: joins a gateway and serves scripted tokens.

Knows AttentionService and ClusterService. What it answers, one token per step, is a function of
the prompt; what it was asked is recorded.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeAlias

import grpc.aio

from moe_core.cluster import AttentionLoad, Join, MemberState, Role
from moe_core.pb.epserve.v1 import attention_pb2 as pb
from moe_core.pb.epserve.v1 import attention_pb2_grpc, logprobs_pb2
from moe_core.service.addresses import host_id, new_instance_epoch
from moe_core.service.grpc_host import GrpcHost
from moe_core.service.membership import Membership

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Script = Callable[[Sequence[int]], Sequence[int]]


class FakeAttention(attention_pb2_grpc.AttentionServiceServicer):
    """Answers each sequence with what `script(prompt_ids)` has after its output_ids, the last token
    with finish_reason "length".

    pause_at: of each sequence only so many tokens come, and no end; `paused` is set then.
    """

    def __init__(self, script: Script, step_s: float = 0.0) -> None:
        self.script = script
        self.step_s = step_s
        self.added: list[Any] = []
        self.aborted: list[str] = []
        self.error: tuple[str, str] | None = None
        self.failing_index: int | None = None  # None: `error` is every choice's
        self.cached_tokens = 0
        self.logprobs: logprobs_pb2.TokenLogprobs | None = None  # of every token
        self.script_of_index: dict[int, Sequence[int]] = {}  # instead of `script`
        self.go_elsewhere = False  # marks `error` so
        self.hands_over = False  # parks sequences: 6 tokens in the blocks 4 and 2
        self.pause_at: int | None = None
        self.paused = asyncio.Event()
        self.hears = asyncio.Event()  # while it is not set, requests wait unread
        self.hears.set()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._abort_seen = asyncio.Event()
        self._writing = asyncio.Lock()

    async def Serve(self, requests: AsyncIterator[Any], context: Context) -> None:
        try:
            async for request in requests:
                await self.hears.wait()
                if request.HasField("abort"):
                    await self._abort(request.abort.sequence_id, context)
                elif request.HasField("park"):
                    await self._park(request.park.sequence_id, context)
                else:
                    self.added.append(request.add)
                    task = asyncio.create_task(self._answer(request.add, context))
                    self._running[request.add.sequence_id] = task
        finally:
            for task in self._running.values():
                task.cancel()

    async def wait_for_abort(self, count: int = 1) -> None:
        async with asyncio.timeout(5):
            while len(self.aborted) < count:
                self._abort_seen.clear()
                await self._abort_seen.wait()

    async def _abort(self, sequence_id: str, context: Context) -> None:
        self.aborted.append(sequence_id)
        was_running = self._running.pop(sequence_id).cancel()
        self._abort_seen.set()
        if not was_running:
            return
        await self._write(
            context, pb.SequenceOutput(sequence_id=sequence_id, finish_reason="abort")
        )

    async def _park(self, sequence_id: str, context: Context) -> None:
        if not self._running.pop(sequence_id).cancel():
            return
        parked = pb.ParkedKv(num_tokens=6, block_ids=[4, 2])
        output = pb.SequenceOutput(sequence_id=sequence_id, finish_reason="parked", parked=parked)
        await self._write(context, output)

    async def _answer(self, add: pb.AddSequence, context: Context) -> None:
        scripted = self.script_of_index.get(add.sampling.index)
        tokens = list(self.script(add.prompt_ids) if scripted is None else scripted)
        if not add.sampling.max_tokens:
            output = pb.SequenceOutput(
                sequence_id=add.sequence_id,
                finish_reason="length",
                num_cached_tokens=self.cached_tokens,
                prompt_logprobs=prompt_logprobs(add),
            )
            await self._write(context, output)
            return
        for index in range(len(add.output_ids), len(tokens)):
            await self._pause_if(index)
            await asyncio.sleep(self.step_s)
            if self.error is not None and self.failing_index in (None, add.sampling.index):
                await self._write(context, self._failed(add.sequence_id, *self.error))
                return
            is_last = index == len(tokens) - 1 and self.pause_at is None
            output = pb.SequenceOutput(
                sequence_id=add.sequence_id,
                token_ids=[tokens[index]],
                finish_reason="length" if is_last else "",
                num_cached_tokens=self.cached_tokens if index == len(add.output_ids) else 0,
                logprobs=[] if self.logprobs is None else [self.logprobs],
                prompt_logprobs=prompt_logprobs(add) if index == 0 else [],
            )
            await self._write(context, output, step=index)
        await self._pause_if(len(tokens))

    def _failed(self, sequence_id: str, code: str, message: str) -> pb.SequenceOutput:
        return pb.SequenceOutput(
            sequence_id=sequence_id,
            finish_reason="error",
            error_code=code,
            error=message,
            go_elsewhere=self.go_elsewhere,
        )

    async def _pause_if(self, index: int) -> None:
        if index == self.pause_at:
            self.paused.set()
            await asyncio.Event().wait()

    async def _write(self, context: Context, output: pb.SequenceOutput, step: int = 0) -> None:
        async with self._writing:
            await context.write(pb.StepOutput(step=step, outputs=[output]))


def prompt_logprobs(add: pb.AddSequence) -> list[logprobs_pb2.TokenLogprobs]:
    """What FakeAttention tells of a prompt whose logprobs are asked for: of token t, -t/4, and the
    likeliest are the tokens 1, 2 and so on with -1/4, -2/4 and so on."""
    if not add.sampling.HasField("prompt_logprobs"):
        return []
    likeliest = range(1, 1 + add.sampling.prompt_logprobs)
    return [
        logprobs_pb2.TokenLogprobs(
            token_id=token,
            logprob=-token / 4,
            rank=token,
            top_token_ids=likeliest,
            top_logprobs=[-each / 4 for each in likeliest],
        )
        for token in add.prompt_ids[1:]
    ]


class FakeWorker:
    """A process of either tier as the gateway sees it; only attention rank 0 of a group serves."""

    def __init__(self, gateway: str, fingerprint: str, role: Role, rank: int | None = None) -> None:
        self._gateway = gateway
        self._fingerprint = fingerprint
        self._role = role
        self._rank = rank
        self._host = GrpcHost()
        self.membership: Membership
        self._load: AttentionLoad | None = None

    async def start(
        self,
        fake: attention_pb2_grpc.AttentionServiceServicer | None = None,
        *,
        dtype: str = "float32",
        total_kv_blocks: int = 64,
        max_num_seqs: int = 64,
        join_timeout_s: float = 10,
        rejoin_timeout_s: float = 10,
    ) -> None:
        if fake is not None:
            add = attention_pb2_grpc.add_AttentionServiceServicer_to_server
            self._host.add(add, fake, "epserve.v1.AttentionService")
        port = await self._host.start("127.0.0.1", 0)
        join = Join(
            role=self._role,
            address=f"127.0.0.1:{port}",
            device="cpu",
            pid=os.getpid(),
            model_fingerprint=self._fingerprint,
            instance_epoch=new_instance_epoch(),
            dtype=dtype,
            host_id=host_id(),
            rank=self._rank,
        )
        try:
            self.membership = await Membership.join(
                self._gateway, join, timeout_s=join_timeout_s, rejoin_timeout_s=rejoin_timeout_s
            )
        except BaseException:
            await self._host.stop(0)
            raise
        hands_over = isinstance(fake, FakeAttention) and fake.hands_over
        load = AttentionLoad(0, 0, total_kv_blocks, total_kv_blocks, 4, max_num_seqs, hands_over)
        self._load = load if self._role is Role.ATTN else None
        self.report(MemberState.READY)

    def report(self, state: MemberState) -> None:
        self.membership.report(state, attention_load=self._load)

    async def stop(self) -> None:
        await self.membership.close()
        await self._host.stop(0)
