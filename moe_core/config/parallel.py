"""The six parallel settings and what follows from them.

Knows the rules of DESIGN section 2 and no process, device or address.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    attn_devices: int = 1
    expert_devices: int = 1
    dp_size: int = 1
    ep_size: int = 1
    enable_mla: bool | None = None  # None: follows the model
    expert_parallel_degree: int | None = None  # None: 0 if ep_size == 1, else 1
    num_redundant_experts: int = 0
    shared_experts: str = "attention"  # or "expert"
    colocated: bool = False

    @property
    def tp_size(self) -> int:
        return self.attn_devices // self.dp_size

    @property
    def etp_size(self) -> int:
        return self.expert_devices // self.ep_size
