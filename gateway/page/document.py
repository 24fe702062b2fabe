"""The cluster as the page is told of it: JSON of bounded size, however large the cluster is.

Knows members, links, groups and which of them are drawn as one. Knows no HTTP, and keeps nothing:
the page makes rates of two documents. Numbers that JSON readers would round are strings.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from gateway.admission import ServedModel
from gateway.expert_totals import ExpertTotals
from gateway.groups import attention_groups
from moe_core.cluster import AttentionLoad, ClusterState, Member, Role
from moe_core.placement import ExpertPlacement, LayerPlacement

MAX_NODES = 16  # per tier; neighbours are drawn as one where there are more
MAX_MEMBERS = 256  # per tier, described one by one
MAX_GROUPS = 256
ABSENT = "absent"
TIERS = (Role.ATTN, Role.EXPERT)


def cluster_document(
    state: ClusterState,
    model: ServedModel,
    expert_load_version: int,
    requests: Mapping[str, float],
) -> dict[str, object]:
    """What changes from second to second. `requests`: see request_totals.py."""
    nodes = {role: _node_ranks(state, role) for role in TIERS}
    return {
        "version": state.version,
        "model": _model(model),
        "layout": _layout(state),
        "placement_epoch": state.placement.epoch,
        "expert_load_version": expert_load_version,
        "gateway": _member(state.members[0]),  # this one, whatever its rank
        "counts": {role: _count_states(state, role) for role in TIERS},
        "members": [shown for role in TIERS for shown in _members(state, role)],
        "nodes": {role: list(_nodes(state, role, nodes[role])) for role in TIERS},
        "links": _links(state, nodes),
        "groups": list(_groups(state))[:MAX_GROUPS],
        "requests": requests,
    }


def experts_document(totals: ExpertTotals) -> dict[str, object]:
    """tokens[i][e]: to expert e of layer layer_ids[i], since the processes of `sources` began.
    Documents of other sources cannot be compared."""
    load = totals.load
    return {
        "version": totals.version,
        "sources": list(map(str, totals.sources)),
        "layer_ids": load.layer_ids if load else (),
        "tokens": load.tokens if load else (),
    }


def placement_document(state: ClusterState) -> dict[str, object]:
    """The EP groups that hold each logical expert; layers that are alike share a table.

    tables[t][e]: EP ranks that hold expert e, ascending. layers: pairs of layer id and t.
    """
    placement = state.placement
    tables: dict[LayerPlacement, int] = {}
    layers = []
    for layer in placement.layers:
        alike = LayerPlacement(0, layer.physical_to_logical, layer.physical_to_ep_rank)
        layers.append((layer.layer_id, tables.setdefault(alike, len(tables))))
    return {
        "epoch": placement.epoch,
        "num_experts": placement.num_logical_experts,
        "etp_size": state.parallel.etp_size,
        "layers": layers,
        "tables": [_holders(placement, table) for table in tables],
    }


def _holders(placement: ExpertPlacement, layer: LayerPlacement) -> list[list[int]]:
    return [
        sorted(layer.physical_to_ep_rank[physical] for physical in layer.replicas(expert))
        for expert in range(placement.num_logical_experts)
    ]


def _model(model: ServedModel) -> dict[str, object]:
    return {
        "name": model.name,
        "model_type": model.config.model_type,
        "max_model_len": model.max_model_len,
        "vocab_size": model.config.vocab_size,
        "has_tokenizer": model.tokenizer is not None,
    }


def _layout(state: ClusterState) -> dict[str, object]:
    parallel = state.parallel
    return {
        "dp_size": parallel.dp_size,
        "tp_size": parallel.tp_size,
        "ep_size": parallel.ep_size,
        "etp_size": parallel.etp_size,
        "expert_parallel_degree": parallel.degree,
        "enable_mla": bool(parallel.enable_mla),
    }


def _member(member: Member) -> dict[str, object]:
    return {
        "name": _name(member.role, member.rank),
        "role": member.role,
        "rank": member.rank,
        "state": member.state,
        "detail": member.detail,
        "address": member.address,
        "device": member.device,
        "pid": member.pid,
        "experts": member.experts,
        "instance_epoch": str(member.instance_epoch),
    }


def _members(state: ClusterState, role: Role) -> list[dict[str, object]]:
    """Every rank that the configuration asks for, joined or not."""
    joined = {member.rank: member for member in state.tier(role)}
    shown: list[dict[str, object]] = []
    for rank in range(min(state.size(role), MAX_MEMBERS)):
        missing = {"name": _name(role, rank), "role": role, "rank": rank, "state": ABSENT}
        shown.append(_member(joined[rank]) if rank in joined else missing)
    return shown


def _count_states(state: ClusterState, role: Role) -> Mapping[str, int]:
    counts = Counter(str(member.state) for member in state.tier(role))
    absent = state.size(role) - counts.total()
    return counts | Counter({ABSENT: absent}) if absent else counts


def _name(role: Role, rank: int) -> str:
    """As links call the process."""
    return "gateway" if role is Role.GATEWAY else f"{role} {rank}"


def _group_size(state: ClusterState, role: Role) -> int:
    return state.parallel.tp_size if role is Role.ATTN else state.parallel.etp_size


def _node_ranks(state: ClusterState, role: Role) -> list[range]:
    """The ranks that are drawn as one: one process, or one group, or several groups."""
    size, group = state.size(role), _group_size(state, role)
    width = 1 if size <= MAX_NODES else group * math.ceil(size / group / MAX_NODES)
    return [range(first, min(first + width, size)) for first in range(0, size, width)]


def _nodes(state: ClusterState, role: Role, nodes: list[range]) -> Iterator[dict[str, object]]:
    states = {member.rank: str(member.state) for member in state.tier(role)}
    group = _group_size(state, role)
    kind = "dp" if role is Role.ATTN else "ep"
    for ranks in nodes:
        first, last = ranks[0] // group, ranks[-1] // group
        yield {
            "name": f"{role} {ranks[0]}" if len(ranks) == 1 else f"{role} {ranks[0]}–{ranks[-1]}",
            "group": f"{kind} {first}" if first == last else f"{kind} {first}–{last}",
            "first_rank": ranks[0],
            "states": [states.get(rank, ABSENT) for rank in ranks],
        }


def _links(state: ClusterState, nodes: Mapping[Role, list[range]]) -> list[dict[str, object]]:
    """Totals between each two nodes that exchange anything; `source` and `target` are places in
    their tier's nodes. Links to processes that are not configured are left out."""
    source_of = _node_of(Role.ATTN, nodes[Role.ATTN])
    target_of = _node_of(Role.EXPERT, nodes[Role.EXPERT])
    totals: dict[tuple[int, int], Counter[str]] = {}
    transports: dict[tuple[int, int], set[str]] = {}
    for member in state.tier(Role.ATTN):
        source = source_of[_name(Role.ATTN, member.rank)]
        for link in member.links:
            if link.target not in target_of:
                continue
            pair = source, target_of[link.target]
            transports.setdefault(pair, set()).add(link.transport)
            totals.setdefault(pair, Counter()).update(
                dispatch_tokens=link.dispatch_tokens,
                dispatch_bytes=link.dispatch_bytes,
                combine_bytes=link.combine_bytes,
                dispatches=link.dispatches,
            )
    return [
        {"source": pair[0], "target": pair[1], "transport": "+".join(sorted(transports[pair]))}
        | dict(totals[pair])
        for pair in sorted(totals)
    ]


def _node_of(role: Role, nodes: list[range]) -> dict[str, int]:
    return {_name(role, rank): place for place, ranks in enumerate(nodes) for rank in ranks}


def _groups(state: ClusterState) -> Iterator[dict[str, object]]:
    """What each attention group's tp_rank 0 reports of all of it; absent where none does."""
    for dp_rank, members in attention_groups(state):
        leader = members[0] if members and members[0].tp_rank == 0 else None
        group: dict[str, object] = {"dp_rank": dp_rank}
        if leader is not None and leader.attention_load is not None:
            group["load"] = _load(leader.attention_load)
        if leader is not None and leader.engine_metrics is not None:
            group["metrics"] = asdict(leader.engine_metrics)
        yield group


def _load(load: AttentionLoad) -> dict[str, int]:
    used = load.total_kv_blocks - load.free_kv_blocks
    return {
        "num_running": load.num_running,
        "num_waiting": load.num_waiting,
        "kv_tokens_used": used * load.kv_block_size,
        "kv_tokens": load.total_kv_blocks * load.kv_block_size,
    }
