"""Which copy of an expert computes a token's share of it.

Knows one layer's placement, and how every EP group stands with this process. Knows no links, and
nothing of why a group stands as it does (peers.py does).

With all groups alike, copies take turns by token index, so equal routing gives an equal choice.
A group that is DOWN gets nothing, one that is AVOIDED only what nobody else holds, and the others
get as many turns in a round as their standing says.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_core.placement import LayerPlacement

DOWN = -1
AVOIDED = 0
BUSY = 1
USUAL = 4
# Of each EP group in turn; the empty one says that all are USUAL.
Standing = tuple[int, ...]
ALL_USUAL: Standing = ()

TARGETED_LEVEL = 2  # below it every EP group gets every row


@dataclass(frozen=True, slots=True)
class LayerTables:
    """One layer's placement as tensors on the attention side's device.

    replicas:      [num_logical, max_turns] int32; row e repeats the physical slots of expert e, -1
                   where no group that holds it can be asked.
    replica_count: [num_logical] int64.
    holder:        [num_physical + ep_size] int64, the EP group of every physical id, the shared
                   expert's copies included.
    logical:       [num_physical + ep_size + 1] int64, the expert of every physical id; the shared
                   expert is num_logical, and the last entry is what index -1 finds: -1.
    sharing:       [n] int64, the groups that take turns with the shared expert; None: all.
    lost:          [num_logical + 1] bool, the experts (the shared one last) that nobody can
                   compute; None: there is none.
    spared:        groups that get no row for which they have nothing to compute, at any level.
    """

    num_physical: int
    ep_size: int
    replicas: Tensor
    replica_count: Tensor
    holder: Tensor
    logical: Tensor
    sharing: Tensor | None
    lost: Tensor | None
    spared: frozenset[int]

    @classmethod
    def build(
        cls,
        layer: LayerPlacement,
        ep_size: int,
        device: torch.device,
        standing: Standing = ALL_USUAL,
    ) -> "LayerTables":
        stands = standing or (USUAL,) * ep_size
        holders = layer.physical_to_ep_rank
        turns = [
            _turns(slots, [stands[holders[slot]] for slot in slots])
            for slots in layer.logical_to_physical
        ]
        groups = _turns(range(ep_size), [min(stand, BUSY) for stand in stands])
        lost = [not slots for slots in turns] + [not groups]
        widest = max(1, *map(len, turns))
        num_logical = len(turns)
        return cls(
            num_physical=layer.num_physical,
            ep_size=ep_size,
            replicas=torch.tensor(
                [
                    [slots[i % len(slots)] if slots else -1 for i in range(widest)]
                    for slots in turns
                ],
                dtype=torch.int32,
                device=device,
            ),
            replica_count=torch.tensor([max(1, len(slots)) for slots in turns], device=device),
            holder=torch.tensor([*holders, *range(ep_size)], dtype=torch.int64, device=device),
            logical=torch.tensor(
                [*layer.physical_to_logical, *[num_logical] * ep_size, -1],
                dtype=torch.int64,
                device=device,
            ),
            sharing=torch.tensor(groups, device=device) if 0 < len(groups) < ep_size else None,
            lost=torch.tensor(lost, device=device) if any(lost) else None,
            spared=frozenset(rank for rank, stand in enumerate(stands) if stand <= AVOIDED),
        )


def _turns(slots: Sequence[int], stands: Sequence[int]) -> list[int]:
    """A round of turns among `slots`, by their holders' standing; none where all are DOWN."""
    able = [(slot, stand) for slot, stand in zip(slots, stands, strict=True) if stand != DOWN]
    wanted = [pair for pair in able if pair[1] != AVOIDED] or able
    if len({stand for _, stand in wanted}) <= 1:
        return [slot for slot, _ in wanted]
    most = max(stand for _, stand in wanted)
    return [slot for turn in range(most) for slot, stand in wanted if turn < stand]


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
        group = shared_turns(tables, turn)[:, None]
    return (group + tables.num_physical).int()


def shared_turns(tables: LayerTables, turn: Tensor) -> Tensor:
    """The EP groups whose turn with the shared expert it is, [num_tokens] int64."""
    if tables.sharing is None:
        return turn % tables.ep_size
    return tables.sharing[turn % tables.sharing.shape[0]]
