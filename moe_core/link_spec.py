"""What both ends of an exchange must agree on, derived from what both tiers know.

Knows the model's widths and the parallel configuration; the Hello compares the outcome. Knows
no wire and no process.
"""

import torch

from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.transport.base import LinkSpec, TransportOptions

SLOT_TOKENS = 512  # a larger batch goes in chunks
IN_FLIGHT_MICROBATCHES = 1


def link_spec(
    config: ModelConfig,
    parallel: ParallelConfig,
    model_fingerprint: str,
    dtype: torch.dtype,
    options: TransportOptions,
) -> LinkSpec:
    """num_columns is top_k, and one more where the expert tier runs the shared expert."""
    return LinkSpec(
        model_fingerprint=model_fingerprint,
        dtype=dtype,
        hidden_size=config.hidden_size,
        num_columns=config.moe.num_experts_per_tok + parallel.shared_on_experts,
        slot_tokens=SLOT_TOKENS,
        slot_count=IN_FLIGHT_MICROBATCHES + options.spare_slots,
    )
