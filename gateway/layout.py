"""What the tiers are, and what they are to become: sizes and placements.

Knows no member, and not who decides on a change (scaling.py, placement_leader.py).
"""

from dataclasses import dataclass

from moe_core.cluster import ClusterState, Member, TierSizes
from moe_core.config.parallel import ParallelConfig
from moe_core.placement import ExpertPlacement


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes and placement as this gateway has them. `told`: by a worker, else they are those
    that it was started with. `settled`: the cluster has been complete. next_placement, target: see
    ClusterState."""

    parallel: ParallelConfig
    placement: ExpertPlacement
    told: bool = False
    settled: bool = False
    next_placement: ExpertPlacement | None = None
    target: TierSizes | None = None

    @classmethod
    def of(cls, state: ClusterState) -> "Layout":
        """As the leading gateway has it."""
        return cls(
            state.parallel,
            state.placement,
            told=True,
            settled=True,
            next_placement=state.next_placement,
            target=state.target,
        )

    def with_members(self, version: int, members: tuple[Member, ...]) -> ClusterState:
        return ClusterState(
            version,
            self.parallel,
            members,
            self.placement,
            next_placement=self.next_placement,
            target=self.target,
        )

    @property
    def accepted(self) -> ParallelConfig:
        """The sizes that ranks may have: those in force, and those that the tiers grow to."""
        if self.target is None:
            return self.parallel
        return self.parallel.covering(self.target.attn_devices, self.target.expert_devices)

    def num_experts(self, ep_rank: int) -> int:
        """The most that one layer needs there, in what is used and in what is prepared."""
        placements = filter(None, (self.placement, self.next_placement))
        held = max(placement.num_local_experts(ep_rank) for placement in placements)
        return held + self.parallel.shared_on_experts
