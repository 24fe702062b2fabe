"""Loads one rank's weights, showing how far it is.

Knows the checkpoint and the rank. Knows no process.
"""

import structlog

from attn_service.assembly import Site
from moe_core.checkpoint.attention_loader import load_attention_weights
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.progress import shown_progress
from moe_core.model.fastest_form import fastest_form
from moe_core.model.weights import AttentionTierWeights

log = structlog.get_logger(__name__)


def load_weights(checkpoint: Checkpoint, site: Site) -> AttentionTierWeights:
    rank = site.group_rank
    form = fastest_form(site.dtype, site.device)
    with shown_progress(f"attn {site.rank}: loading", "layer") as progress:
        weights = load_attention_weights(
            checkpoint,
            tp_rank=rank.tp_rank,
            tp_size=rank.tp_size,
            shared_expert=not site.parallel.shared_on_experts,
            dtype=site.dtype,
            device=site.device,
            form=form,
            progress=progress,
        )
    log.info(
        "attention weights loaded",
        rank=site.rank,
        matrix_form=str(form),
        bytes_read=checkpoint.bytes_read,
    )
    return weights
