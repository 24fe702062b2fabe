"""Between the configuration and placement of a cluster and the messages of cluster.proto.

Knows both forms and nothing else.
"""

from moe_core.config.parallel import ParallelConfig
from moe_core.pb.epserve.v1 import cluster_pb2 as pb
from moe_core.placement import ExpertPlacement, LayerPlacement


def parallel_to_pb(parallel: ParallelConfig) -> pb.ParallelSettings:
    """`parallel` must be resolved: nothing in it follows the model any more."""
    assert parallel.enable_mla is not None
    assert parallel.expert_parallel_degree is not None
    return pb.ParallelSettings(
        attn_devices=parallel.attn_devices,
        expert_devices=parallel.expert_devices,
        dp_size=parallel.dp_size,
        ep_size=parallel.ep_size,
        enable_mla=parallel.enable_mla,
        expert_parallel_degree=parallel.expert_parallel_degree,
        num_redundant_experts=parallel.num_redundant_experts,
        shared_experts=parallel.shared_experts,
        colocated=parallel.colocated,
    )


def parallel_from_pb(message: pb.ParallelSettings) -> ParallelConfig:
    return ParallelConfig(
        attn_devices=message.attn_devices,
        expert_devices=message.expert_devices,
        dp_size=message.dp_size,
        ep_size=message.ep_size,
        enable_mla=message.enable_mla,
        expert_parallel_degree=message.expert_parallel_degree,
        num_redundant_experts=message.num_redundant_experts,
        shared_experts=message.shared_experts,
        colocated=message.colocated,
        live=True,
    )


def placement_to_pb(placement: ExpertPlacement) -> pb.Placement:
    return pb.Placement(
        epoch=placement.epoch,
        num_logical_experts=placement.num_logical_experts,
        ep_size=placement.ep_size,
        layers=[
            pb.LayerPlacement(
                layer_id=layer.layer_id,
                physical_to_logical=layer.physical_to_logical,
                physical_to_ep_rank=layer.physical_to_ep_rank,
            )
            for layer in placement.layers
        ],
    )


def placement_from_pb(message: pb.Placement) -> ExpertPlacement:
    return ExpertPlacement(
        epoch=message.epoch,
        num_logical_experts=message.num_logical_experts,
        ep_size=message.ep_size,
        layers=tuple(
            LayerPlacement(
                layer_id=layer.layer_id,
                physical_to_logical=tuple(layer.physical_to_logical),
                physical_to_ep_rank=tuple(layer.physical_to_ep_rank),
            )
            for layer in message.layers
        ),
    )
