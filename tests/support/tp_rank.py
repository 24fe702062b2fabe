"""One rank of an attention TP group without a model: what a decoder would do to the collectives.

Run as a program it is a follower: `python tp_rank.py LEADER STORE_PORT LEADER_EPOCH`.
"""

import asyncio
import sys

import torch

from attn_service.experts import Combined, ExpertTimes, PendingExperts, StepKey
from attn_service.follow import GroupTerms, follow
from attn_service.group_experts import GroupExperts, GroupRunner
from attn_service.sequence import StepPlan
from attn_service.step_runner import StepResult, StepRunner
from attn_service.step_times import StepTimes
from attn_service.tensor_parallel import GroupRank, dissolve, form, join_store
from moe_core.errors import PeerLostError
from moe_core.even_parts import even_parts
from moe_core.model.tensor_parallel import TensorParallel

VOCAB = 32
NUM_LAYERS = 2
TIMEOUT_S = 10.0
UNLUCKY_TOKEN = 13  # rank 1's experts fail where a step computes it
TERMS = GroupTerms(leader_instance_epoch=77, num_blocks=16, block_size=4)


def next_token(tokens: list[int]) -> int:
    """What the group's logits favour after a step that computes `tokens` of one sequence."""
    value = sum(tokens)
    for _ in range(NUM_LAYERS):
        value = 3 * value  # 2 · value of the experts, and value of the two ranks' halves
    return value % VOCAB


class DoublingExperts:
    """Experts that double each row; each rank computes its share, as ExpertClient does."""

    def __init__(self, tp: TensorParallel) -> None:
        self._tp = tp

    async def dispatch(
        self,
        key: StepKey,
        layer_id: int,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> PendingExperts:
        if self._tp.rank == 1 and layer_id == 1 and (topk_ids == UNLUCKY_TOKEN).any():
            raise PeerLostError(f"expert 1 is gone: layer {layer_id}, step {key.step}")
        return _Doubled(self._tp, hidden_states)


class _Doubled:
    def __init__(self, tp: TensorParallel, hidden_states: torch.Tensor) -> None:
        self._tp = tp
        self._hidden_states = hidden_states

    async def combine(self) -> Combined:
        sizes = even_parts(self._hidden_states.shape[0], self._tp.size)
        start = sum(sizes[: self._tp.rank])
        own = self._hidden_states[start : start + sizes[self._tp.rank]]
        return Combined(self._tp.all_gather(2 * own, sizes), ExpertTimes())

    def release(self) -> None: ...


class LayeredRunner:
    """Rows are sequences, each the sum of its new tokens, through NUM_LAYERS layers."""

    def __init__(self, tp: TensorParallel, experts: GroupExperts) -> None:
        self._tp = tp
        self._experts = experts

    async def execute(self, plan: StepPlan) -> StepResult:
        tokens = torch.tensor([part.token_ids[-1:] for part in plan.slices])  # [n, 1]
        rows = torch.tensor([[float(sum(part.token_ids))] for part in plan.slices])  # [n, 1]
        for layer_id in range(NUM_LAYERS):
            key = StepKey(plan.placement_epoch, plan.step)
            pending = await self._experts.dispatch(key, layer_id, rows, tokens, rows)
            shared = self._tp.all_reduce(rows / self._tp.size)
            rows = (await pending.combine()).hidden_states + shared
        favoured = rows[:, 0].round().long() % VOCAB
        return StepResult(torch.nn.functional.one_hot(favoured, VOCAB).float(), StepTimes(steps=1))


def group_runner(tp: TensorParallel, publish=None) -> GroupRunner:  # noqa: ANN001
    experts = GroupExperts(DoublingExperts(tp), tp)
    runner: StepRunner = LayeredRunner(tp, experts)
    return GroupRunner(runner, experts, publish)


async def run_follower(leader: str, store_port: int, leader_epoch: int) -> None:
    rank = GroupRank(dp_rank=0, tp_rank=1, tp_size=2)
    store = join_store("127.0.0.1", store_port, rank.tp_size, TIMEOUT_S)
    tp = form(rank, store, torch.device("cpu"), TIMEOUT_S)
    terms = GroupTerms(leader_epoch, TERMS.num_blocks, TERMS.block_size)
    try:
        await follow(leader, rank, terms, group_runner(tp).follow)
    finally:
        dissolve()


if __name__ == "__main__":
    asyncio.run(run_follower(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
