"""An attention TP group of two real processes: gloo between them, plans over Follow.

The leader is this process, the follower a child that runs support/tp_rank.py.
"""

import asyncio
import os
import re
import signal
import sys
import threading
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from attn_service.duties import Leading
from attn_service.engine import Engine
from attn_service.expert_counts import CountedExperts
from attn_service.follow import Followers
from attn_service.kv_blocks import BlockPool
from attn_service.scheduler import SchedulerConfig
from attn_service.sequence import Sampling, SequenceRequest
from attn_service.servicer import SERVICE_NAME, AttentionServicer, add_to_server
from attn_service.tensor_parallel import GroupLostError, GroupRank, dissolve, form, open_store
from moe_core.errors import UnavailableError
from moe_core.service.grpc_host import GrpcHost
from support import tp_rank
from support.moe_configs import moe_model
from support.tp_rank import (
    TERMS,
    TIMEOUT_S,
    UNLUCKY_TOKEN,
    VOCAB,
    DoublingExperts,
    group_runner,
    next_token,
)

START_TIMEOUT_S = 60.0  # a child imports torch on a busy machine
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@dataclass
class Group:
    leading: Leading
    follower: Process

    async def tokens(
        self, *prompts: tuple[int, ...], fails: bool = False
    ) -> list[tuple[tuple[int, ...], str]]:
        """One token of each prompt (or none), and the last word on it."""
        stream = self.leading.engine.sequences.open_stream()
        for index, prompt in enumerate(prompts):
            stream.add(SequenceRequest(str(index), prompt, Sampling(max_tokens=1)))
        stream.end_of_requests()
        results = {}
        with pytest.raises(UnavailableError) if fails else nullcontext():
            async for step in stream.outputs():
                for output in step.outputs:
                    last = output.error or output.finish_reason or ""
                    results[output.sequence_id] = (output.token_ids, last)
        return [results[str(index)] for index in range(len(prompts))]


@asynccontextmanager
async def group(leader_epoch: int = TERMS.leader_instance_epoch) -> AsyncIterator[Group]:
    rank = GroupRank(dp_rank=0, tp_rank=0, tp_size=2)
    followers = Followers(rank, TERMS, TIMEOUT_S)
    servicer = AttentionServicer()
    servicer.accept(followers)
    host = GrpcHost()
    host.add(add_to_server, servicer, SERVICE_NAME)
    port = await host.start("127.0.0.1", 0)
    store = open_store("127.0.0.1", rank.tp_size, START_TIMEOUT_S)
    follower = await _start_follower(f"127.0.0.1:{port}", store.port, leader_epoch)
    try:
        tp = await asyncio.to_thread(form, rank, store, CPU, START_TIMEOUT_S)
        engine = Engine(
            group_runner(tp, followers.publish),
            BlockPool(TERMS.num_blocks, TERMS.block_size),
            SchedulerConfig(max_num_seqs=4, max_step_tokens=16, max_model_len=32),
            vocab_size=VOCAB,
            placement_epoch=lambda: 0,
        )
        async with asyncio.timeout(START_TIMEOUT_S):
            if leader_epoch == TERMS.leader_instance_epoch:
                await followers.all_connected(START_TIMEOUT_S)
            counted = CountedExperts(DoublingExperts(tp), moe_model(), CPU)
            yield Group(Leading(engine, followers, counted), follower)
    finally:
        if follower.returncode is None:
            follower.kill()
        await follower.communicate()
        await host.stop(0)
        dissolve()


async def _start_follower(leader: str, store_port: int, leader_epoch: int) -> Process:
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return await asyncio.create_subprocess_exec(
        sys.executable, tp_rank.__file__, leader, str(store_port), str(leader_epoch),
        stderr=PIPE,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


async def test_both_ranks_execute_the_leaders_plans_and_the_follower_ends_with_them() -> None:
    async with group() as formed:
        running = asyncio.create_task(formed.leading.run())
        # 3 rows over 2 ranks: the parts are uneven; 1 row: rank 1's part is empty.
        prompts = [(1, 2), (3,), (4, 5, 6)]
        results = await formed.tokens(*prompts)
        assert results == [((next_token(list(p)),), "length") for p in prompts]
        assert await formed.tokens((9,)) == [((next_token([9]),), "length")]
        await formed.leading.drain()
        assert await formed.follower.wait() == 0
        running.cancel()
        await asyncio.wait({running})


async def test_a_step_that_one_ranks_experts_fail_fails_alike_on_all_and_the_group_goes_on() -> (
    None
):
    async with group() as formed:
        running = asyncio.create_task(formed.leading.run())
        results = await formed.tokens((1,), (UNLUCKY_TOKEN,))
        assert results == [((), "expert 1 is gone: layer 1, step 1")] * 2
        assert await formed.tokens((2,), (3,)) == [
            ((next_token([2]),), "length"),
            ((next_token([3]),), "length"),
        ]
        assert formed.follower.returncode is None
        running.cancel()
        await asyncio.wait({running})


async def test_losing_an_idle_follower_ends_the_leader() -> None:
    async with group() as formed:
        running = asyncio.create_task(formed.leading.run())
        await formed.tokens((1,))
        formed.follower.kill()
        with pytest.raises(GroupLostError, match=r"dp_rank=0 .* lost tp_rank 1"):
            await asyncio.wait_for(running, TIMEOUT_S)


async def test_losing_a_follower_inside_a_collective_fails_what_is_under_way() -> None:
    async with group() as formed:
        running = asyncio.create_task(formed.leading.run())
        await formed.tokens((1,))
        formed.follower.send_signal(signal.SIGSTOP)
        # The leader's loop will stand still inside the collective, so a thread ends the wait.
        killer = threading.Timer(0.5, formed.follower.kill)
        killer.start()
        results = await formed.tokens((1,), (2,), fails=True)
        for tokens, error in results:
            assert tokens == ()
            assert re.match(r"attention group dp_rank=0 .* lost a rank in all_reduce", error)
        with pytest.raises(GroupLostError, match="lost a rank in all_reduce"):
            await asyncio.wait_for(running, TIMEOUT_S)
        killer.join()


async def test_a_follower_of_another_start_of_the_leader_is_refused_with_both_values() -> None:
    async with group(leader_epoch=76) as formed:
        _, stderr = await formed.follower.communicate()
        assert formed.follower.returncode == 1
        assert b"leader_instance_epoch=76" in stderr
        assert b"leader_instance_epoch=77" in stderr


async def test_store_of_a_group_on_this_machine_is_reached_from_nowhere_else() -> None:
    store = open_store("127.0.0.1", 2, TIMEOUT_S)
    listening = [
        each.laddr
        for each in psutil.Process().net_connections(kind="tcp")
        if each.status == psutil.CONN_LISTEN and each.laddr.port == store.port
    ]
    assert [address.ip for address in listening] == ["127.0.0.1"]
