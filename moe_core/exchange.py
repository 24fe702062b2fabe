"""What both tiers derive alike about the links between them.

Knows a model's widths, the parallel configuration and how many tokens a slot takes. Knows no
transport: a LinkSpec is a value to all of them.
"""

import torch

from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.transport.base import LinkSpec

# A decode batch fits one slot; a longer prefill goes in chunks of this many tokens.
SLOT_TOKENS = 256
# The most parts that an attention process computes a step in, each with one dispatch in flight.
# Both tiers reckon with it, since only the attention tier is told --microbatches.
MAX_MICROBATCHES = 3


def link_spec(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    model_fingerprint: str,
    dtype: torch.dtype,
    spare_slots: int,
) -> LinkSpec:
    """The spec of every link of one cluster; both ends must be built with the same values.

    spare_slots: slots beyond one per micro-batch in flight (TransportOptions.spare_slots).
    """
    return LinkSpec(
        model_fingerprint=model_fingerprint,
        dtype=dtype,
        hidden_size=model.hidden_size,
        num_columns=model.moe.num_experts_per_tok + parallel.shared_on_experts,
        slot_tokens=SLOT_TOKENS,
        slot_count=MAX_MICROBATCHES + spare_slots,
    )
