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
    """Answers each sequence with `script(prompt_ids)`, then finish_reason "length"."""

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
        self._running: dict[str, asyncio.Task[None]] = {}
        self._abort_seen = asyncio.Event()
        self._writing = asyncio.Lock()

    async def Serve(self, requests: AsyncIterator[Any], context: Context) -> None:
        try:
            async for request in requests:
                if request.HasField("abort"):
                    self._abort(request.abort.sequence_id)
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

    def _abort(self, sequence_id: str) -> None:
        self.aborted.append(sequence_id)
        self._running.pop(sequence_id).cancel()
        self._abort_seen.set()

    async def _answer(self, add: pb.AddSequence, context: Context) -> None:
        scripted = self.script_of_index.get(add.sampling.index)
        tokens = list(self.script(add.prompt_ids) if scripted is None else scripted)
        for index, token in enumerate(tokens):
            await asyncio.sleep(self.step_s)
            reason = "length" if index == len(tokens) - 1 else ""
            output = pb.SequenceOutput(
                sequence_id=add.sequence_id,
                token_ids=[token],
                finish_reason=reason,
                num_cached_tokens=self.cached_tokens if index == 0 else 0,
                logprobs=[] if self.logprobs is None else [self.logprobs],
            )
            if self.error is not None and self.failing_index in (None, add.sampling.index):
                code, message = self.error
                output = pb.SequenceOutput(
                    sequence_id=add.sequence_id,
                    finish_reason="error",
                    error_code=code,
                    error=message,
                )
            async with self._writing:
                await context.write(pb.StepOutput(step=index, outputs=[output]))
            if output.finish_reason == "error":
                return


class FakeWorker:
    """A process of either tier as the gateway sees it; only attention rank 0 of a group serves."""

    def __init__(self, gateway: str, fingerprint: str, role: Role, rank: int | None = None) -> None:
        self._gateway = gateway
        self._fingerprint = fingerprint
        self._role = role
        self._rank = rank
        self._host = GrpcHost()
        self.membership: Membership

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
        load = AttentionLoad(0, 0, total_kv_blocks, total_kv_blocks, 4, max_num_seqs)
        attention = self._role is Role.ATTN
        self.membership.report(MemberState.READY, attention_load=load if attention else None)

    async def stop(self) -> None:
        await self.membership.close()
        await self._host.stop(0)
