"""Which process of a cluster is which: tier, ranks, experts, device and port, as a table.

Knows the parallel configuration, the model's shape and the devices of one machine. Starts
nothing, and asks the machine nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from moe_core.cluster import Role
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.placement import ExpertPlacement

LEVELS = ("EP off", "EP Level 1 (broadcast-all)", "EP Level 2 (targeted)")


@dataclass(frozen=True, slots=True)
class ExpertsHeld:
    """Physical experts per MoE layer of one process, by why they are there."""

    routed: int
    redundant: int
    shared: int

    def __str__(self) -> str:
        return f"{self.routed}+{self.redundant}+{self.shared}"


@dataclass(frozen=True, slots=True)
class Place:
    """One process. The ranks that its tier does not have are None; port 0 is any free one, and
    only the gateway has an http_port."""

    role: Role
    rank: int
    device: str
    port: int
    dp_rank: int | None = None
    tp_rank: int | None = None
    ep_rank: int | None = None
    etp_rank: int | None = None
    experts: ExpertsHeld | None = None
    http_port: int | None = None

    @property
    def name(self) -> str:
        return name_of(self.role, self.rank)


def name_of(role: Role, rank: int) -> str:
    """As errors and log lines call a process."""
    return "gateway" if role is Role.GATEWAY else f"{role} {rank}"


def device_of(parallel: ParallelConfig, num_cuda_devices: int, role: Role, rank: int) -> str:
    """The device of an attention or expert rank, also of one beyond the tier's size.

    Colocated, rank i of both tiers is on device i; otherwise the tiers follow one another. With
    fewer devices than that takes, it starts again at the first. "cpu" with no CUDA device.
    """
    if num_cuda_devices == 0:
        return "cpu"
    first = 0 if role is Role.ATTN or parallel.colocated else parallel.attn_devices
    return f"cuda:{(first + rank) % num_cuda_devices}"


def spread_devices(
    parallel: ParallelConfig, num_cuda_devices: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The devices of the attention and of the expert ranks."""
    sizes = ((Role.ATTN, parallel.attn_devices), (Role.EXPERT, parallel.expert_devices))
    attn, expert = (
        tuple(device_of(parallel, num_cuda_devices, role, rank) for rank in range(size))
        for role, size in sizes
    )
    return attn, expert


def derive_layout(
    parallel: ParallelConfig,
    model: ModelConfig,
    attn_devices: Sequence[str],
    expert_devices: Sequence[str],
    gateway_ports: tuple[int, int],
) -> tuple[Place, ...]:
    """Every process of the cluster: the gateway, then both tiers in rank order. gateway_ports:
    for gRPC and for HTTP."""
    grpc_port, http_port = gateway_ports
    places = [Place(Role.GATEWAY, 0, "", grpc_port, http_port=http_port)]
    for rank, device in enumerate(attn_devices):
        dp_rank, tp_rank = parallel.attention_ranks(rank)
        places.append(Place(Role.ATTN, rank, device, 0, dp_rank=dp_rank, tp_rank=tp_rank))
    held = experts_held(parallel, model)
    for rank, device in enumerate(expert_devices):
        ep_rank, etp_rank = parallel.expert_ranks(rank)
        places.append(
            Place(
                Role.EXPERT,
                rank,
                device,
                0,
                ep_rank=ep_rank,
                etp_rank=etp_rank,
                experts=held[ep_rank],
            )
        )
    return tuple(places)


def experts_held(parallel: ParallelConfig, model: ModelConfig) -> tuple[ExpertsHeld, ...]:
    """What a process of each EP group holds per MoE layer, under the placement of epoch 0."""
    placement = ExpertPlacement.initial(model, parallel)
    shared = int(parallel.shared_on_experts)
    routed, more = divmod(model.moe.num_experts, parallel.ep_size)
    held = []
    for ep_rank in range(parallel.ep_size):
        own = routed + (ep_rank < more)
        held.append(ExpertsHeld(own, placement.num_local_experts(ep_rank) - own, shared))
    return tuple(held)


def describe(parallel: ParallelConfig, model: ModelConfig) -> str:
    """Model and derived sizes in one line."""
    return f"{model.model_type}: {describe_sizes(parallel)}"


def describe_sizes(parallel: ParallelConfig) -> str:
    """The derived sizes of a configuration that is settled for its model, in one line."""
    cache = "MLA cache" if parallel.enable_mla else "per-head K/V cache"
    return (
        f"attention dp {parallel.dp_size} × tp {parallel.tp_size}, "
        f"experts ep {parallel.ep_size} × tp {parallel.etp_size}, "
        f"{LEVELS[parallel.degree]}, {cache}"
    )


def layout_table(places: Sequence[Place]) -> Table:
    table = Table(caption_justify="left")
    table.add_column("process")
    for column in ("dp", "tp", "ep", "etp"):
        table.add_column(column, justify="right")
    table.add_column("experts per layer", justify="right")
    table.add_column("device")
    table.add_column("port", justify="right")
    for place in places:
        ranks = (place.dp_rank, place.tp_rank, place.ep_rank, place.etp_rank)
        table.add_row(
            place.name,
            *("" if rank is None else str(rank) for rank in ranks),
            "" if place.experts is None else str(place.experts),
            place.device,
            _ports(place),
        )
    table.caption = "experts per layer: routed + redundant + shared; gateway's ports: gRPC / HTTP"
    return table


def _ports(place: Place) -> str:
    port = str(place.port) if place.port else "any"
    return port if place.http_port is None else f"{port} / {place.http_port or 'any'}"
