"""Which rows go to which EP group, as which physical experts.

Pure functions of a layer's routing and its tables. Knows levels of expert parallelism and the
shared expert's column; knows no links, no weights' values and no tensors of hidden states, and
leaves the choice among copies to replica_choice.py.

Invariants, for every level: each (token, chosen expert) pair is in exactly one group's ids,
once; with the shared expert on the expert tier so is each token's shared column; a token is in
a group's rows at most once. At Level 2, and wherever something is planned again, a group's rows
are exactly those that have an id there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_service.replica_choice import (
    TARGETED_LEVEL,
    LayerTables,
    choose_physical,
    shared_column,
    shared_turns,
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

    def only(self, positions: Tensor) -> "GroupDispatch":
        """Those of its rows that are at `positions` [n] int64."""
        rows = positions if self.rows is None else self.rows[positions]
        return GroupDispatch(self.ep_rank, rows, self.physical_ids[positions])

    def within(self, rows: Tensor) -> "GroupDispatch":
        """The same, where this one's rows count those that `rows` names."""
        return GroupDispatch(
            self.ep_rank, rows if self.rows is None else rows[self.rows], self.physical_ids
        )


def plan_dispatch(
    tables: LayerTables, topk_ids: Tensor, level: int, shared_on_experts: bool, first_token: int = 0
) -> list[GroupDispatch]:
    """The messages of one layer, by ascending EP rank; groups that get no row are left out.

    topk_ids: [num_tokens, top_k] int, logical experts, none of them lost. first_token: where
    taking turns starts; equal routing with an equal first_token gives an equal plan.
    """
    if topk_ids.shape[0] == 0:
        return []
    physical_ids = choose_physical(tables, topk_ids, first_token)
    if shared_on_experts:
        shared = shared_column(tables, physical_ids, level, first_token)
        physical_ids = torch.cat((physical_ids, shared), dim=1)  # [num_tokens, num_columns]
    if tables.ep_size == 1:
        return [GroupDispatch(0, None, physical_ids)]
    group_ids, mine = _by_group(tables, physical_ids)
    if level == TARGETED_LEVEL:
        return _targeted(group_ids, mine)
    return [
        GroupDispatch(rank, None, ids)
        for rank, ids in enumerate(group_ids)
        if rank not in tables.spared or bool(mine[rank].any())
    ]


def plan_again(
    tables: LayerTables, failed: GroupDispatch, num_tokens: int, first_token: int
) -> tuple[list[GroupDispatch], Tensor]:
    """Who else computes what `failed` was to compute, by ascending EP rank, and which of its rows
    (as positions in it, int64) nobody can.

    tables: in which the group that failed is DOWN. num_tokens: as many as `rows` None stands for.
    A row in which `failed` had nothing to compute is in neither.
    """
    ids = failed.physical_ids
    logical = tables.logical[ids.long()]  # [num_rows, num_columns], -1 where there was nothing
    needed = logical >= 0
    within = needed.any(dim=1)
    beyond = torch.zeros_like(within)
    if tables.lost is not None:
        beyond = (tables.lost[logical] & needed).any(dim=1)
    covered = (within & ~beyond).nonzero()[:, 0]
    uncovered = beyond.nonzero()[:, 0]
    if covered.numel() == 0:
        return [], uncovered
    physical_ids = _other_copies(tables, logical[covered], first_token)
    group_ids, mine = _by_group(tables, physical_ids)
    rows = failed.rows
    if rows is None:
        rows = torch.arange(num_tokens, device=ids.device)
    groups = _targeted(group_ids, mine & (physical_ids >= 0))
    return [group.within(rows[covered]) for group in groups], uncovered


def _other_copies(tables: LayerTables, logical: Tensor, first_token: int) -> Tensor:
    """Physical ids [n, num_columns] int32 of logical ones, of which -1 stays -1."""
    num_logical = tables.replicas.shape[0]
    chosen = choose_physical(tables, logical.clamp(0, num_logical - 1), first_token)
    routed = (logical >= 0) & (logical < num_logical)
    physical_ids = torch.where(routed, chosen, -1)
    shared = logical == num_logical
    if bool(shared.any()):
        turn = torch.arange(first_token, first_token + logical.shape[0], device=logical.device)
        # With one of the token's routed experts, where there is one: it costs no further row.
        first = physical_ids.max(dim=1).values.long()
        group = torch.where(first >= 0, tables.holder[first], shared_turns(tables, turn))
        copies = (group + tables.num_physical).int()[:, None]
        physical_ids = torch.where(shared, copies, physical_ids)
    return physical_ids


def _by_group(tables: LayerTables, physical_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each group's ids [ep_size, num_tokens, num_columns], -1 where not its own, and which are."""
    groups = torch.arange(tables.ep_size, device=physical_ids.device)[:, None, None]
    mine = tables.holder[physical_ids.long()] == groups
    return torch.where(mine, physical_ids, -1), mine


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
