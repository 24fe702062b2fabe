"""Which rows go to which EP group, as which physical experts.

Pure functions of a layer's routing and its placement. Knows levels of expert parallelism,
replicas and the shared expert's column; knows no links, no weights' values and no tensors of
hidden states.

Invariants, for every level: each (token, chosen expert) pair is in exactly one group's ids,
once; with the shared expert on the expert tier so is each token's shared column; a token is in
a group's rows at most once. At Level 2 a group's rows are exactly those that have an id there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_core.placement import LayerPlacement

TARGETED_LEVEL = 2  # below it every EP group gets every row


@dataclass(frozen=True, slots=True)
class LayerTables:
    """One layer's placement as tensors on the attention side's device.

    replicas:      [num_logical, max_copies] int32; row e repeats the physical slots of expert e.
    replica_count: [num_logical] int64.
    holder:        [num_physical + ep_size] int64, the EP group of every physical id, the shared
                   expert's copies included.
    """

    num_physical: int
    ep_size: int
    replicas: Tensor
    replica_count: Tensor
    holder: Tensor

    @classmethod
    def build(cls, layer: LayerPlacement, ep_size: int, device: torch.device) -> "LayerTables":
        copies = layer.logical_to_physical
        widest = max(map(len, copies))
        return cls(
            num_physical=layer.num_physical,
            ep_size=ep_size,
            replicas=torch.tensor(
                [[slots[i % len(slots)] for i in range(widest)] for slots in copies],
                dtype=torch.int32,
                device=device,
            ),
            replica_count=torch.tensor([len(slots) for slots in copies], device=device),
            holder=torch.tensor(
                [*layer.physical_to_ep_rank, *range(ep_size)], dtype=torch.int64, device=device
            ),
        )


@dataclass(frozen=True, slots=True)
class GroupDispatch:
    """What every process of one EP group is sent.

    rows: [num_rows] int64, ascending; None means all rows.
    physical_ids: [num_rows, num_columns] int32, -1 where the expert is not this group's.
    """

    ep_rank: int
    rows: Tensor | None
    physical_ids: Tensor


def choose_physical(tables: LayerTables, topk_ids: Tensor, first_token: int) -> Tensor:
    """Physical ids [num_tokens, top_k] int32 for logical ones; copies are taken in turn by
    token index, counted from `first_token`."""
    topk_ids = topk_ids.long()
    if tables.replicas.shape[1] == 1:
        return tables.replicas[:, 0][topk_ids]
    turn = torch.arange(first_token, first_token + topk_ids.shape[0], device=topk_ids.device)
    copy = turn[:, None] % tables.replica_count[topk_ids]  # [num_tokens, top_k]
    return tables.replicas[topk_ids, copy]


def shared_column(
    tables: LayerTables, physical_ids: Tensor, level: int, first_token: int
) -> Tensor:
    """The shared expert's physical id for every token, [num_tokens, 1] int32.

    Groups take turns by token index; at Level 2 only those that receive the token anyway.
    """
    num_tokens, top_k = physical_ids.shape
    turn = torch.arange(first_token, first_token + num_tokens, device=physical_ids.device)
    if level == TARGETED_LEVEL:
        column = (turn % top_k)[:, None]  # [num_tokens, 1]
        group = tables.holder[physical_ids.gather(1, column).long()]
    else:
        group = (turn % tables.ep_size)[:, None]
    return (group + tables.num_physical).int()


def plan_dispatch(
    tables: LayerTables, topk_ids: Tensor, level: int, shared_on_experts: bool, first_token: int = 0
) -> list[GroupDispatch]:
    """The messages of one layer, by ascending EP rank; groups that get no row are left out.

    topk_ids: [num_tokens, top_k] int, logical experts. first_token: where taking turns starts;
    equal routing with an equal first_token gives an equal plan.
    """
    if topk_ids.shape[0] == 0:
        return []
    physical_ids = choose_physical(tables, topk_ids, first_token)
    if shared_on_experts:
        shared = shared_column(tables, physical_ids, level, first_token)
        physical_ids = torch.cat((physical_ids, shared), dim=1)  # [num_tokens, num_columns]
    if tables.ep_size == 1:
        return [GroupDispatch(0, None, physical_ids)]
    groups = torch.arange(tables.ep_size, device=physical_ids.device)[:, None, None]
    mine = tables.holder[physical_ids.long()] == groups  # [ep_size, num_tokens, num_columns]
    group_ids = torch.where(mine, physical_ids, -1)
    if level != TARGETED_LEVEL:
        return [GroupDispatch(rank, None, ids) for rank, ids in enumerate(group_ids)]
    return _targeted(group_ids, mine)


def _targeted(group_ids: Tensor, mine: Tensor) -> list[GroupDispatch]:
    receives = mine.any(dim=2)  # [ep_size, num_tokens]
    counts: list[int] = receives.sum(dim=1).tolist()
    rows_by_group = torch.split(receives.nonzero()[:, 1], counts)
    return [
        GroupDispatch(rank, rows, group_ids[rank][rows])
        for rank, rows in enumerate(rows_by_group)
        if counts[rank]
    ]


def with_shared_weight(topk_weights: Tensor, shared_on_experts: bool) -> Tensor:
    """[num_tokens, num_columns]: the router's weights, and 1.0 for the shared expert."""
    if not shared_on_experts:
        return topk_weights
    return torch.nn.functional.pad(topk_weights, (0, 1), value=1.0)
