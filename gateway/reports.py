"""What a member says of itself, and what of that others act upon.

Knows one member and one report at a time. Keeps nothing.
"""

from dataclasses import replace

from moe_core.cluster import ExpertLoad, Member, StatusReport
from moe_core.errors import RequestError
from moe_core.placement import ExpertPlacement


def with_report(member: Member, report: StatusReport) -> Member:
    return replace(
        member,
        state=report.state,
        detail=report.detail,
        store_address=report.store_address,
        attention_load=report.attention_load,
        engine_metrics=report.engine_metrics,
        links=report.links,
        prepared_epoch=report.prepared_epoch,
        used_epoch=report.used_epoch,
        refused_epoch=report.refused_epoch,
    )


def with_expert_load(member: Member, load: ExpertLoad, placement: ExpertPlacement) -> Member:
    """Raises RequestError unless the load has the shape of the model's experts."""
    layer_ids = tuple(layer.layer_id for layer in placement.layers)
    num_experts = placement.num_logical_experts
    if load.layer_ids != layer_ids or {*map(len, load.tokens)} != {num_experts}:
        raise RequestError(
            f"expert_load: {member.role} {member.rank} reports {sum(map(len, load.tokens))} counts "
            f"of {len(load.layer_ids)} layers; this model has {num_experts} experts in each "
            f"of its MoE layers {', '.join(map(str, layer_ids))}"
        )
    return replace(member, expert_load=load)


def visible(member: Member) -> tuple[object, ...]:
    """What of a report others act upon: of a load, only that there is one."""
    has_load = member.attention_load is not None
    epochs = (member.prepared_epoch, member.used_epoch, member.refused_epoch)
    return member.state, member.detail, member.store_address, has_load, epochs
