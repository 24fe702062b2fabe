"""What the router's choices add up to."""

import torch

from attn_service.expert_counts import CountedExperts
from attn_service.experts import PendingExperts, StepKey
from moe_core.cluster import ExpertLoad
from support.moe_configs import moe_model

MODEL = moe_model(num_experts=4)
KEY = StepKey(0, 1)


class NotedExperts:
    def __init__(self) -> None:
        self.seen: list[tuple[int, list[list[int]]]] = []

    async def dispatch(
        self,
        key: StepKey,
        layer_id: int,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> PendingExperts:
        self.seen.append((layer_id, topk_ids.tolist()))
        return self

    async def combine(self): ...

    def release(self) -> None: ...


async def test_tokens_are_counted_by_layer_and_logical_expert_and_handed_on() -> None:
    inner = NotedExperts()
    counted = CountedExperts(inner, MODEL, torch.device("cpu"))
    hidden = torch.zeros(3, MODEL.hidden_size)

    async def dispatch(layer_id: int, topk_ids: list[list[int]]) -> None:
        ids = torch.tensor(topk_ids)
        pending = await counted.dispatch(KEY, layer_id, hidden, ids, torch.ones(ids.shape))
        assert pending is inner

    assert counted.load == ExpertLoad((1, 2), ((0,) * 4, (0,) * 4))
    await dispatch(1, [[0, 1], [0, 3], [0, 1]])
    await dispatch(2, [[2, 3]])
    await dispatch(1, [[3, 0]])
    assert counted.load == ExpertLoad((1, 2), ((4, 2, 0, 2), (0, 0, 1, 1)))
    assert inner.seen == [(1, [[0, 1], [0, 3], [0, 1]]), (2, [[2, 3]]), (1, [[3, 0]])]


async def test_only_the_rows_that_are_asked_for_are_counted() -> None:
    counted = CountedExperts(NotedExperts(), MODEL, torch.device("cpu"))
    ids = torch.tensor([[0, 1], [0, 3], [2, 1]])
    hidden, weights = torch.zeros(3, MODEL.hidden_size), torch.ones(ids.shape)
    await counted.dispatch(KEY, 1, hidden, ids, weights, torch.tensor([0, 2]))
    assert counted.load == ExpertLoad((1, 2), ((1, 2, 1, 0), (0,) * 4))
