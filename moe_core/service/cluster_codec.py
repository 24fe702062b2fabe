"""Between the plain values of moe_core.cluster and the messages of cluster.proto.

Knows both forms and nothing else. Whatever a peer may send wrongly (an unknown role or state, a
missing part) is refused with a RequestError that names the field.
"""

import math
from dataclasses import fields
from typing import Literal

from moe_core.cluster import (
    AttentionLoad,
    ClusterState,
    EngineMetrics,
    ExpertLoad,
    Join,
    LinkStats,
    Member,
    MemberState,
    Role,
    StatusReport,
    TierSizes,
)
from moe_core.errors import RequestError
from moe_core.pb.epserve.v1 import cluster_pb2 as pb
from moe_core.service.layout_codec import (
    parallel_from_pb,
    parallel_to_pb,
    placement_from_pb,
    placement_to_pb,
)

ROLES = {
    Role.GATEWAY: pb.ROLE_GATEWAY,
    Role.ATTN: pb.ROLE_ATTN,
    Role.EXPERT: pb.ROLE_EXPERT,
}
ROLES_BACK = {int(number): role for role, number in ROLES.items()}
STATES = {
    MemberState.LOADING: pb.MEMBER_STATE_LOADING,
    MemberState.CONNECTING: pb.MEMBER_STATE_CONNECTING,
    MemberState.READY: pb.MEMBER_STATE_READY,
    MemberState.DRAINING: pb.MEMBER_STATE_DRAINING,
    MemberState.FAILED: pb.MEMBER_STATE_FAILED,
}
STATES_BACK = {int(number): state for state, number in STATES.items()}
RANKS = ("dp_rank", "tp_rank", "ep_rank", "etp_rank")
LOAD_FIELDS = tuple(field.name for field in fields(AttentionLoad))
METRIC_FIELDS = tuple(field.name for field in fields(EngineMetrics))
LINK_FIELDS = tuple(field.name for field in fields(LinkStats))


def role_to_pb(role: Role) -> pb.Role:
    return ROLES[role]


def role_from_pb(number: int) -> Role:
    if number not in ROLES_BACK:
        raise RequestError(f"role={number}: must be one of {', '.join(ROLES)}")
    return ROLES_BACK[number]


def state_from_pb(number: int) -> MemberState:
    if number not in STATES_BACK:
        raise RequestError(f"state={number}: must be one of {', '.join(STATES)}")
    return STATES_BACK[number]


def join_to_pb(join: Join) -> pb.Join:
    return pb.Join(
        role=ROLES[join.role],
        rank=join.rank,
        address=join.address,
        device=join.device,
        pid=join.pid,
        model_fingerprint=join.model_fingerprint,
        instance_epoch=join.instance_epoch,
        dtype=join.dtype,
        host_id=join.host_id,
        placement=None if join.placement is None else placement_to_pb(join.placement),
        parallel=None if join.parallel is None else parallel_to_pb(join.parallel),
    )


def join_from_pb(message: pb.Join) -> Join:
    return Join(
        role=role_from_pb(message.role),
        rank=message.rank if message.HasField("rank") else None,
        address=message.address,
        device=message.device,
        pid=message.pid,
        model_fingerprint=message.model_fingerprint,
        instance_epoch=message.instance_epoch,
        dtype=message.dtype,
        host_id=message.host_id,
        placement=(placement_from_pb(message.placement) if message.HasField("placement") else None),
        parallel=parallel_from_pb(message.parallel) if message.HasField("parallel") else None,
    )


def report_to_pb(report: StatusReport) -> pb.StatusReport:
    return pb.StatusReport(
        state=STATES[report.state],
        detail=report.detail,
        store_address=report.store_address,
        attention_load=load_to_pb(report.attention_load),
        engine_metrics=metrics_to_pb(report.engine_metrics),
        links=[link_to_pb(link) for link in report.links],
        prepared_epoch=report.prepared_epoch,
        used_epoch=report.used_epoch,
        refused_epoch=report.refused_epoch,
    )


def report_from_pb(message: pb.StatusReport) -> StatusReport:
    return StatusReport(
        state=state_from_pb(message.state),
        detail=message.detail,
        store_address=message.store_address,
        attention_load=load_from_pb(message),
        engine_metrics=metrics_from_pb(message),
        links=tuple(link_from_pb(link) for link in message.links),
        prepared_epoch=_epoch(message, "prepared_epoch"),
        used_epoch=_epoch(message, "used_epoch"),
        refused_epoch=_epoch(message, "refused_epoch"),
    )


def _epoch(
    message: pb.StatusReport | pb.Member,
    name: Literal["prepared_epoch", "used_epoch", "refused_epoch"],
) -> int | None:
    epoch: int = getattr(message, name)
    return epoch if message.HasField(name) else None


def load_to_pb(load: AttentionLoad | None) -> pb.AttentionLoad | None:
    if load is None:
        return None
    return pb.AttentionLoad(**{name: getattr(load, name) for name in LOAD_FIELDS})


def load_from_pb(message: pb.StatusReport | pb.Member) -> AttentionLoad | None:
    if not message.HasField("attention_load"):
        return None
    load = message.attention_load
    return AttentionLoad(**{name: getattr(load, name) for name in LOAD_FIELDS})


def metrics_to_pb(metrics: EngineMetrics | None) -> pb.EngineMetrics | None:
    if metrics is None:
        return None
    return pb.EngineMetrics(**{name: getattr(metrics, name) for name in METRIC_FIELDS})


def metrics_from_pb(message: pb.StatusReport | pb.Member) -> EngineMetrics | None:
    if not message.HasField("engine_metrics"):
        return None
    metrics = message.engine_metrics
    for name in METRIC_FIELDS:
        if not math.isfinite(getattr(metrics, name)):
            raise RequestError(f"engine_metrics.{name}={getattr(metrics, name)}: must be finite")
    return EngineMetrics(**{name: getattr(metrics, name) for name in METRIC_FIELDS})


def expert_load_to_pb(load: ExpertLoad) -> pb.ExpertLoad:
    layers = zip(load.layer_ids, load.tokens, strict=True)
    return pb.ExpertLoad(
        layers=[pb.LayerExpertLoad(layer_id=layer_id, tokens=tokens) for layer_id, tokens in layers]
    )


def expert_load_from_pb(message: pb.ExpertLoad) -> ExpertLoad:
    return ExpertLoad(
        layer_ids=tuple(layer.layer_id for layer in message.layers),
        tokens=tuple(tuple(layer.tokens) for layer in message.layers),
    )


def link_to_pb(link: LinkStats) -> pb.LinkStats:
    return pb.LinkStats(**{name: getattr(link, name) for name in LINK_FIELDS})


def link_from_pb(message: pb.LinkStats) -> LinkStats:
    if not math.isfinite(message.wait_s):
        raise RequestError(f"links.wait_s={message.wait_s}: must be finite")
    return LinkStats(**{name: getattr(message, name) for name in LINK_FIELDS})


def member_to_pb(member: Member) -> pb.Member:
    """Without expert_load, which stays with the gateway."""
    return pb.Member(
        role=ROLES[member.role],
        rank=member.rank,
        pid=member.pid,
        address=member.address,
        device=member.device,
        state=STATES[member.state],
        detail=member.detail,
        instance_epoch=member.instance_epoch,
        store_address=member.store_address,
        host_id=member.host_id,
        attention_load=load_to_pb(member.attention_load),
        engine_metrics=metrics_to_pb(member.engine_metrics),
        links=[link_to_pb(link) for link in member.links],
        experts=member.experts,
        queued_requests=member.queued_requests,
        prepared_epoch=member.prepared_epoch,
        used_epoch=member.used_epoch,
        refused_epoch=member.refused_epoch,
        leaving=member.leaving,
        loop_tasks=member.loop_tasks,
        **{name: getattr(member, name) for name in RANKS},
    )


def member_from_pb(message: pb.Member) -> Member:
    ranks = {name: getattr(message, name) if message.HasField(name) else None for name in RANKS}
    return Member(
        role=role_from_pb(message.role),
        rank=message.rank,
        pid=message.pid,
        address=message.address,
        device=message.device,
        state=state_from_pb(message.state),
        detail=message.detail,
        instance_epoch=message.instance_epoch,
        store_address=message.store_address,
        host_id=message.host_id,
        attention_load=load_from_pb(message),
        engine_metrics=metrics_from_pb(message),
        links=tuple(link_from_pb(link) for link in message.links),
        experts=message.experts,
        queued_requests=message.queued_requests,
        leaving=message.leaving,
        loop_tasks=message.loop_tasks,
        prepared_epoch=_epoch(message, "prepared_epoch"),
        used_epoch=_epoch(message, "used_epoch"),
        refused_epoch=_epoch(message, "refused_epoch"),
        **ranks,
    )


def cluster_to_pb(state: ClusterState) -> pb.ClusterState:
    return pb.ClusterState(
        version=state.version,
        parallel=parallel_to_pb(state.parallel),
        members=[member_to_pb(member) for member in state.members],
        placement=placement_to_pb(state.placement),
        expert_load=None if state.expert_load is None else expert_load_to_pb(state.expert_load),
        next_placement=(
            None if state.next_placement is None else placement_to_pb(state.next_placement)
        ),
        target=(
            None
            if state.target is None
            else pb.TierSizes(
                attn_devices=state.target.attn_devices, expert_devices=state.target.expert_devices
            )
        ),
    )


def cluster_from_pb(message: pb.ClusterState) -> ClusterState:
    return ClusterState(
        version=message.version,
        parallel=parallel_from_pb(message.parallel),
        members=tuple(member_from_pb(member) for member in message.members),
        placement=placement_from_pb(message.placement),
        expert_load=(
            expert_load_from_pb(message.expert_load) if message.HasField("expert_load") else None
        ),
        next_placement=(
            placement_from_pb(message.next_placement)
            if message.HasField("next_placement")
            else None
        ),
        target=(
            TierSizes(message.target.attn_devices, message.target.expert_devices)
            if message.HasField("target")
            else None
        ),
    )
