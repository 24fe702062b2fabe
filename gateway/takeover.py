"""What a gateway that was started again learns of its predecessor's cluster from the workers.

Knows placements, sizes and which of two is the newer. Knows no member and no stream.

Workers tell what they knew last. The newest placement counts, and the sizes that were told
together with it; where workers differ in those (one had not yet heard of a change) the larger
ones, so that nobody who is there loses its rank. That ends once the cluster has been complete:
from then on this gateway knows better. What cannot be of the same cluster is refused by name.
"""

from dataclasses import replace

from gateway.layout import Layout
from moe_core.cluster import Join
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import RequestError
from moe_core.placement import ExpertPlacement

# A running cluster may change its other sizes; these are the same for its whole life.
FIXED = ("tp_size", "etp_size", "enable_mla", "shared_experts", "colocated")


def take_over(known: Layout, join: Join) -> Layout:
    """`known` with what a worker tells. Raises RequestError for a placement or sizes that cannot
    be this cluster's, naming both sides' values."""
    told = join.placement
    if told is None or join.parallel is None:
        return known
    _check_fixed(known.parallel, join.parallel, join)
    _check_placement(known, told, join)
    if known.settled or told.epoch < known.placement.epoch:
        return known
    if told.epoch == known.placement.epoch and known.told:
        told_sizes = join.parallel
        parallel = known.parallel.covering(told_sizes.attn_devices, told_sizes.expert_devices)
        return replace(known, parallel=parallel)
    return replace(known, parallel=join.parallel, placement=told, told=True)


def _check_fixed(known: ParallelConfig, told: ParallelConfig, join: Join) -> None:
    for name in FIXED:
        theirs, ours = getattr(told, name), getattr(known, name)
        if theirs != ours:
            raise RequestError(
                f"{name}={theirs}: the {join.role} process at {join.address} was in a cluster "
                f"with that, and this gateway was started with {name}={ours}; start all alike"
            )


def _check_placement(known: Layout, told: ExpertPlacement, join: Join) -> None:
    who = f"the {join.role} process at {join.address}"
    ours = known.placement
    if _shape(told) != _shape(ours):
        raise RequestError(
            f"placement: {who} knows one of {_in_words(told)}, this gateway one of "
            f"{_in_words(ours)}"
        )
    if told.epoch == ours.epoch and told != ours:
        raise RequestError(
            f"placement: {who} knows another one of epoch {told.epoch} than this gateway, so it "
            "was in another cluster; start it again"
        )
    if known.settled and told.epoch > ours.epoch:
        raise RequestError(
            f"placement: {who} knows epoch {told.epoch}, but this cluster is complete with epoch "
            f"{ours.epoch}; start it again"
        )


def _shape(placement: ExpertPlacement) -> tuple[int, tuple[int, ...]]:
    return placement.num_logical_experts, tuple(layer.layer_id for layer in placement.layers)


def _in_words(placement: ExpertPlacement) -> str:
    num_experts, layer_ids = _shape(placement)
    return f"{num_experts} experts in layers {', '.join(map(str, layer_ids))}"
