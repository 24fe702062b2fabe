"""Which experts get copies, and which EP group holds what, so that all are loaded alike.

The published EPLB method of DeepSeek: experts are copied greedily by load per copy, and the
copies packed heaviest first into the group that has least; hierarchically, first groups of
experts into nodes and then each node by itself, or globally. To it comes one rule of this
system's: copies of one expert are on different EP groups.

Knows loads and slots of one layer as plain numbers. Knows no placement epoch and nobody who
moves anything. `held` is what each EP group holds, by rank: logical experts in slot order.

Invariants of every `held` made here: each expert is there; no group holds one twice; sizes of
groups differ by at most one, the longer ones first.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from moe_core.even_parts import even_parts

Held = Sequence[Sequence[int]]


def balanced(
    load: Sequence[float],
    num_slots: int,
    ep_size: int,
    *,
    num_expert_groups: int = 1,
    num_nodes: int = 1,
) -> list[list[int]]:
    """`held` for experts of which `load[e]` is the load, in any unit.

    num_expert_groups: the router's groups of neighbouring experts. num_nodes: the EP groups are on
    so many machines, as many on each, in rank order. An expert's load is shared by its copies
    alike. Hierarchical where the nodes divide the expert groups and hold enough slots each.
    """
    capacity = even_parts(num_slots, ep_size)
    per_node = len(load) // num_nodes  # experts
    ranks = [
        range(n * ep_size // num_nodes, (n + 1) * ep_size // num_nodes) for n in range(num_nodes)
    ]
    slots = [sum(capacity[rank] for rank in node) for node in ranks]
    fits = all(
        per_node <= number <= per_node * len(node)
        for number, node in zip(slots, ranks, strict=True)
    )
    if num_expert_groups % num_nodes or ep_size % num_nodes or not fits:
        return _balanced_node(load, range(len(load)), capacity)
    held = []
    for node, experts in zip(
        ranks, _experts_of_nodes(load, num_expert_groups, num_nodes), strict=True
    ):
        held += _balanced_node(load, experts, [capacity[rank] for rank in node])
    return held


def resized(held: Held, load: Sequence[float], ep_size: int) -> list[list[int]]:
    """As many slots on another number of EP groups, where what can stay does, in its slot.

    Groups that become smaller give up their last slots. Copies stay copies; where there are more
    than EP groups, experts of high load per copy get them instead.
    """
    num_slots = sum(map(len, held))
    capacity = even_parts(num_slots, ep_size)
    kept = [
        list(held[rank][: capacity[rank]]) if rank < len(held) else [] for rank in range(ep_size)
    ]
    counts = Counter(expert for group in held for expert in group)
    copies = _replicate(
        load, [min(counts[e], ep_size) for e in range(len(load))], num_slots, ep_size
    )
    missing = copies - Counter(expert for group in kept for expert in group)
    per_copy = {expert: load[expert] / copies[expert] for expert in copies}
    _pack(list(missing.elements()), per_copy, capacity, kept)
    return [
        _in_old_slots(old, new) for old, new in zip([*held, *([()] * ep_size)], kept, strict=False)
    ]


def least_moved(old: Held, new: Held, num_nodes: int = 1) -> list[list[int]]:
    """`new` with its EP groups, and the slots in each, named so that the fewest experts move from
    where `old` has them; a group stays with the groups of its node, and among those of its size.
    `old` may have another number of EP groups."""
    old = [*old, *([()] * len(new))][: len(new)]
    per_node = len(new) // num_nodes
    nodes = [range(n * per_node, (n + 1) * per_node) for n in range(num_nodes)]
    inside = {
        (a, b): _match(old, new, nodes[a], nodes[b])
        for a in range(num_nodes)
        for b in range(num_nodes)
    }
    stays = np.array([[inside[a, b][0] for b in range(num_nodes)] for a in range(num_nodes)])
    source = [group for a, b in enumerate(_assign(stays)) for group in inside[a, b][1]]
    return [_in_old_slots(was, new[group]) for was, group in zip(old, source, strict=True)]


def num_moved(old: Held, new: Held) -> int:
    """Experts that an EP group holds in `new` and did not in `old`."""
    before = [set(group) for group in old] + [set()] * len(new)
    return sum(len(set(group) - was) for group, was in zip(new, before, strict=False))


def imbalance(load: Sequence[float], held: Held) -> float:
    """The load of the most loaded EP group over the mean; 1 where there is no load."""
    copies = Counter(expert for group in held for expert in group)
    loads = [sum(load[expert] / copies[expert] for expert in group) for group in held]
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0


def _experts_of_nodes(load: Sequence[float], num_groups: int, num_nodes: int) -> list[list[int]]:
    """The experts of each node: whole groups, as many on each."""
    size = len(load) // num_groups
    members = [range(group * size, (group + 1) * size) for group in range(num_groups)]
    loads = {group: sum(load[e] for e in members[group]) for group in range(num_groups)}
    packs: list[list[int]] = [[] for _ in range(num_nodes)]
    _pack(range(num_groups), loads, [num_groups // num_nodes] * num_nodes, packs)
    return [[expert for group in pack for expert in members[group]] for pack in packs]


def _balanced_node(
    load: Sequence[float], experts: Sequence[int], capacity: Sequence[int]
) -> list[list[int]]:
    """The EP groups of one node, which holds `experts` and no others."""
    loads = [load[expert] for expert in experts]
    copies = _replicate(loads, [1] * len(loads), sum(capacity), len(capacity))
    # In the order in which copies are made, which decides between equals.
    places = [*range(len(loads)), *(copies - Counter(range(len(loads)))).elements()]
    per_copy = {place: loads[place] / count for place, count in copies.items()}
    packs: list[list[int]] = [[] for _ in capacity]
    _pack(places, per_copy, capacity, packs)
    return [[experts[place] for place in pack] for pack in packs]


def _replicate(
    load: Sequence[float], copies: Sequence[int], num_slots: int, most: int
) -> Counter[int]:
    """How often each expert is there: from `copies` on, slot by slot to the one with the highest
    load per copy, at most `most` times."""
    counts = Counter(dict(enumerate(copies)))
    for _ in range(num_slots - sum(copies)):
        able = (expert for expert, count in counts.items() if count < most)
        counts[max(able, key=lambda expert: load[expert] / counts[expert])] += 1
    return counts


def _pack(
    items: Sequence[int], weight: dict[int, float], capacity: Sequence[int], packs: list[list[int]]
) -> None:
    """Put `items` into `packs`, heaviest first, each into the lightest with room that lacks it."""
    if max(capacity) == 1 and not any(packs):  # nothing to choose: they stay in order
        for pack, item in zip(packs, items, strict=True):
            pack.append(item)
        return
    loads = [sum(weight[item] for item in pack) for pack in packs]
    for item in sorted(items, key=lambda item: -weight[item]):
        room = [p for p, pack in enumerate(packs) if len(pack) < capacity[p]]
        lacking = [p for p in room if item not in packs[p]]
        if lacking:
            target = min(lacking, key=loads.__getitem__)
        else:
            target = _make_room(item, room, weight, packs, loads)
        packs[target].append(item)
        loads[target] += weight[item]


def _make_room(
    item: int,
    room: Sequence[int],
    weight: dict[int, float],
    packs: list[list[int]],
    loads: list[float],
) -> int:
    """The lightest pack without `item`, which is full: what it gives away is the heaviest that
    the lightest pack with room lacks. There is one: the full pack is no smaller than the other,
    which holds `item` itself."""
    spare = min(room, key=loads.__getitem__)
    full = min((p for p in range(len(packs)) if item not in packs[p]), key=loads.__getitem__)
    moved = max((i for i in packs[full] if i not in packs[spare]), key=weight.__getitem__)
    packs[full].remove(moved)
    packs[spare].append(moved)
    loads[full] -= weight[moved]
    loads[spare] += weight[moved]
    return full


def _match(
    old: Held, new: Held, old_ranks: Sequence[int], new_ranks: Sequence[int]
) -> tuple[int, list[int]]:
    """How many experts stay at best, and which of `new_ranks` each of `old_ranks` becomes. Ranks
    of different sizes are not exchanged: `new` says how large each is."""
    never = -sum(map(len, new)) - 1
    stays = np.array(
        [
            [
                len(set(old[a]) & set(new[b])) if len(new[a]) == len(new[b]) else never
                for b in new_ranks
            ]
            for a in old_ranks
        ]
    )
    columns = _assign(stays)
    kept = sum(int(stays[row, column]) for row, column in enumerate(columns))
    return kept, [new_ranks[column] for column in columns]


def _assign(value: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> list[int]:
    """The column of each row so that the sum of `value` [n, n] is highest: the Hungarian method,
    by shortest augmenting paths, O(n³)."""
    size = len(value)
    cost = np.zeros((size + 1, size + 1))
    cost[1:, 1:] = -value
    row_potential, column_potential = np.zeros(size + 1), np.zeros(size + 1)
    row_of = np.zeros(size + 1, dtype=np.int64)  # by column; 0: none
    for row in range(1, size + 1):
        row_of[0] = row
        nearest = np.full(size + 1, np.inf)
        before = np.zeros(size + 1, dtype=np.int64)
        seen = np.zeros(size + 1, dtype=bool)
        column = 0
        while row_of[column]:
            seen[column] = True
            at = row_of[column]
            distance = cost[at] - row_potential[at] - column_potential
            closer = ~seen & (distance < nearest)
            closer[0] = False
            nearest[closer], before[closer] = distance[closer], column
            open_ = np.where(seen, np.inf, nearest)
            open_[0] = np.inf
            following = int(open_.argmin())
            step = open_[following]
            row_potential[row_of[seen]] += step
            column_potential[seen] -= step
            nearest[~seen] -= step
            column = following
        while column:
            row_of[column] = row_of[before[column]]
            column = int(before[column])
    columns = [0] * size
    for column in range(1, size + 1):
        columns[int(row_of[column]) - 1] = column - 1
    return columns


def _in_old_slots(old: Sequence[int], new: Sequence[int]) -> list[int]:
    """`new` ordered so that what `old` has too keeps its slot, as far as there is one."""
    wanted = set(new)
    slots = [expert if expert in wanted else None for expert in old[: len(new)]]
    slots += [None] * (len(new) - len(slots))
    rest = iter([expert for expert in new if expert not in slots])
    return [next(rest) if expert is None else expert for expert in slots]
