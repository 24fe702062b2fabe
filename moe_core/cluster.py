"""What a process knows of the cluster it is in: members, roles, states and load.

Plain values that the ClusterService's two ends exchange; knows neither gRPC nor how anything
is served.
"""

from collections.abc import Set
from dataclasses import dataclass
from enum import StrEnum

from moe_core.config.parallel import ParallelConfig
from moe_core.placement import ExpertPlacement


class Role(StrEnum):
    GATEWAY = "gateway"
    ATTN = "attn"
    EXPERT = "expert"


class MemberState(StrEnum):
    LOADING = "loading"
    CONNECTING = "connecting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class AttentionLoad:
    """hands_over: the group parks sequences, so that another can have their KV blocks."""

    num_running: int
    num_waiting: int
    free_kv_blocks: int
    total_kv_blocks: int
    kv_block_size: int
    max_num_seqs: int
    hands_over: bool = False


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """An attention group's totals since it began. Seconds (…_s) are those of `steps` steps:
    step_s is the sum of attention, dispatch, expert_wait, combine, sampling and other;
    expert_queue and expert_compute are the expert tier's own account of them.

    prefix_query_tokens: tokens of admitted requests; prefix_hit_tokens: those of them that were in
    the cache. output_tokens: sampled and put out. handed_over_tokens: of sequences that another
    group had parked, tokens whose keys and values came from there; recomputed_tokens: those that
    had to be computed again.
    """

    steps: int
    step_s: float
    attention_s: float
    dispatch_s: float
    expert_wait_s: float
    expert_queue_s: float
    expert_compute_s: float
    combine_s: float
    sampling_s: float
    other_s: float
    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    output_tokens: int = 0
    handed_over_tokens: int = 0
    recomputed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Tokens that an attention group's router has given to each expert since its process began.

    tokens[i][e]: to logical expert e of layer layer_ids[i]. A token counts once for each of its
    top_k experts.
    """

    layer_ids: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]

    def since(self, before: "ExpertLoad") -> "ExpertLoad":
        """What came after `before`, an earlier report of the same processes."""
        rows = zip(self.tokens, before.tokens, strict=True)
        return ExpertLoad(
            self.layer_ids,
            tuple(tuple(now - then for now, then in zip(*row, strict=True)) for row in rows),
        )


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """What a new placement does for one layer. load_before, load_after: of the most loaded EP group
    over the mean."""

    layer_id: int
    experts_moved: int
    load_before: float
    load_after: float


@dataclass(frozen=True, slots=True)
class LinkStats:
    """One attention process's totals towards one expert process, in bytes and counts. wait_s: the
    seconds for which it waited for this one and for no other. dispatch_tokens: a token counts in
    every layer."""

    source: str
    target: str
    transport: str
    dispatches: int
    dispatch_bytes: int
    combine_bytes: int
    routing_bytes: int
    stream_tensor_bytes: int
    doorbells: int
    wait_s: float = 0.0
    dispatch_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Member:
    """One process. The ranks that its role does not have are None. expert_load is known to the
    gateway only. prepared_epoch, used_epoch, refused_epoch: see StatusReport. leaving: it is asked
    to drain, and then to leave. loop_tasks: of its event loop, 0 before it has
    said."""

    role: Role
    rank: int
    pid: int
    address: str
    device: str
    state: MemberState
    instance_epoch: int
    host_id: str
    dp_rank: int | None = None
    tp_rank: int | None = None
    ep_rank: int | None = None
    etp_rank: int | None = None
    detail: str = ""
    store_address: str = ""
    experts: int = 0
    attention_load: AttentionLoad | None = None
    links: tuple[LinkStats, ...] = ()
    engine_metrics: EngineMetrics | None = None
    queued_requests: int = 0
    expert_load: ExpertLoad | None = None
    prepared_epoch: int | None = None
    used_epoch: int | None = None
    leaving: bool = False
    refused_epoch: int | None = None
    loop_tasks: int = 0


@dataclass(frozen=True, slots=True)
class Join:
    """What a worker says of itself when it joins. `rank` None asks for the lowest free one.

    placement, parallel: of a worker that was in the cluster before, the latest that it knows.
    """

    role: Role
    address: str  # host:port where peers reach this worker's own server
    device: str
    pid: int
    model_fingerprint: str
    instance_epoch: int
    dtype: str
    host_id: str
    rank: int | None = None
    placement: ExpertPlacement | None = None
    parallel: ParallelConfig | None = None


@dataclass(frozen=True, slots=True)
class StatusReport:
    """What a worker says of itself from time to time; each report replaces the one before.

    prepared_epoch: of an expert process, the newest placement that it can serve. used_epoch: of an
    attention process, the oldest placement that a step of its may still use. refused_epoch: of an
    expert process, the next placement that it cannot prepare; `detail` says why.
    """

    state: MemberState
    detail: str = ""
    store_address: str = ""
    attention_load: AttentionLoad | None = None
    links: tuple[LinkStats, ...] = ()
    engine_metrics: EngineMetrics | None = None
    prepared_epoch: int | None = None
    used_epoch: int | None = None
    refused_epoch: int | None = None


@dataclass(frozen=True, slots=True)
class TierSizes:
    """How many processes each tier is to have."""

    attn_devices: int
    expert_devices: int

    @classmethod
    def of(cls, parallel: ParallelConfig) -> "TierSizes":
        return cls(parallel.attn_devices, parallel.expert_devices)

    @property
    def by_role(self) -> dict[Role, int]:
        return {Role.ATTN: self.attn_devices, Role.EXPERT: self.expert_devices}


@dataclass(frozen=True, slots=True)
class ClusterState:
    """expert_load: of all attention groups; None except in an answer to who asked for it.

    next_placement: what expert processes are to prepare for, while all still use `placement`.
    target: what the tiers are to grow or shrink to; None where they are as they should be.
    """

    version: int
    parallel: ParallelConfig
    members: tuple[Member, ...]
    placement: ExpertPlacement
    expert_load: ExpertLoad | None = None
    next_placement: ExpertPlacement | None = None
    target: TierSizes | None = None

    def tier(self, role: Role) -> tuple[Member, ...]:
        """The members of one role in rank order."""
        found = (member for member in self.members if member.role is role)
        return tuple(sorted(found, key=lambda member: member.rank))

    def holds_all_experts(self, placement: ExpertPlacement) -> bool:
        """Whether READY processes hold every expert of `placement`; of a TP-sharded one, all."""
        ready = {m.rank for m in self.tier(Role.EXPERT) if m.state is MemberState.READY}
        return placement.is_covered_by(self.whole_ep_groups(placement, ready))

    def whole_ep_groups(self, placement: ExpertPlacement, ranks: Set[int]) -> set[int]:
        """The EP groups of `placement` of which all processes are among `ranks`."""
        size = self.parallel.etp_size
        groups = range(placement.ep_size)
        return {g for g in groups if ranks >= {*range(g * size, (g + 1) * size)}}

    def size(self, role: Role) -> int:
        """How many members of this role the configuration asks for."""
        sizes = {Role.ATTN: self.parallel.attn_devices, Role.EXPERT: self.parallel.expert_devices}
        return sizes.get(role, 1)

    def room(self, role: Role) -> int:
        """How many members of this role may join: the larger size, while the tier changes."""
        sizes = {} if self.target is None else self.target.by_role
        return max(self.size(role), sizes.get(role, 0))

    def missing(self, role: Role) -> tuple[str, ...]:
        """One phrase for every rank of `role` that is not READY, e.g. "expert 2: not joined"."""
        present = {member.rank: member for member in self.tier(role)}
        phrases = []
        for rank in range(self.size(role)):
            member = present.get(rank)
            if member is None:
                phrases.append(f"{role} {rank}: not joined")
            elif member.state is not MemberState.READY:
                detail = f" ({member.detail})" if member.detail else ""
                phrases.append(f"{role} {rank}: {member.state}{detail}")
        return tuple(phrases)
