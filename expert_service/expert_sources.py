"""Where a process gets an expert from that it does not hold yet.

Knows files and which process this is. Knows no placement's history and nothing of why an expert is
wanted.
"""

from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.expert_loader import ExpertShard, load_expert
from moe_core.cluster import ClusterState
from moe_core.model.weights import ExpertWeights
from moe_core.service.own_thread import in_own_thread


class DiskSource:
    """An ExpertSource that reads the checkpoint."""

    def __init__(self, checkpoint: Checkpoint, shard: ExpertShard) -> None:
        self._checkpoint = checkpoint
        self._shard = shard

    async def expert(self, layer_id: int, logical: int, state: ClusterState) -> ExpertWeights:
        """Raises CheckpointError."""
        return await in_own_thread(load_expert, self._checkpoint, self._shard, layer_id, logical)

    async def rest(self) -> None:
        """Nothing stays open."""
