"""One expert as the bytes in which it travels to another process, and back.

Knows the matrices' shapes and that every form of them keeps their values. Knows no stream and no
peer.
"""

from dataclasses import dataclass

from torch import Tensor

from moe_core.checkpoint.expert_loader import ExpertShard
from moe_core.config.model import ModelConfig
from moe_core.errors import CheckpointError
from moe_core.model.matrix_forms import Matrix, values_of
from moe_core.model.weight_forms import expert_in_form
from moe_core.model.weights import ExpertWeights
from moe_core.transport.handover import HandoverSpec, digest_of
from moe_core.transport.wire import dtype_name


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """w13 [2 · part, hidden] and then w2 [hidden, part], row by row, in the shard's dtype."""

    shard: ExpertShard
    hidden: int
    part: int  # moe_intermediate / etp

    @classmethod
    def of(cls, model: ModelConfig, shard: ExpertShard) -> "ExpertForm":
        return cls(shard, model.hidden_size, model.moe.moe_intermediate_size // shard.etp_size)

    @property
    def _w13_bytes(self) -> int:
        return 2 * self.part * self.hidden * self.shard.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self._w13_bytes + self.hidden * self.part * self.shard.dtype.itemsize

    def spec(self, model_fingerprint: str) -> HandoverSpec:
        return HandoverSpec(
            model_fingerprint=model_fingerprint,
            dtype=dtype_name(self.shard.dtype),
            shard_rank=self.shard.etp_rank,
            shard_size=self.shard.etp_size,
            unit_bytes=self.num_bytes,
        )

    def store(self, weights: ExpertWeights, memory: Tensor) -> bytes:
        """Fill `memory` [num_bytes] uint8 and return the digest of what it then holds."""
        w13, w2 = self._views(memory)
        w13.copy_(self._plain(weights.w13))
        w2.copy_(self._plain(weights.w2))
        return digest_of(memory)

    def restore(self, memory: Tensor, digest: bytes) -> ExpertWeights:
        """The expert that `memory` holds, in tensors of its own. Raises CheckpointError where that
        is not what `digest` was made from."""
        found = digest_of(memory)
        if found != digest:
            raise CheckpointError(
                f"{self.num_bytes} bytes of an expert came damaged: their blake3 is {found.hex()}, "
                f"the sender's {digest.hex()}"
            )
        w13, w2 = self._views(memory)
        device = self.shard.device
        weights = ExpertWeights(w13.clone().to(device), w2.clone().to(device))
        return expert_in_form(weights, self.shard.form)

    def _views(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        dtype, cut = self.shard.dtype, self._w13_bytes
        return (
            memory[:cut].view(dtype).view(2 * self.part, self.hidden),
            memory[cut:].view(dtype).view(self.hidden, self.part),
        )

    def _plain(self, matrix: Matrix) -> Tensor:
        """No form changes a value, so this is what was loaded."""
        return values_of(matrix).to(self.shard.dtype)
