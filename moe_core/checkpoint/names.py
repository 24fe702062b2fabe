"""How the five families name their tensors.

Knows names only. Per-expert names are those of published checkpoints; `experts.gate_up_proj` and
`experts.down_proj` hold all experts of a layer in one tensor, as transformers 5 keeps them in
memory and writes with `save_original_format=False`, where Mixtral's block is `mlp` as well.
"""

from collections.abc import Container
from dataclasses import dataclass

from moe_core.config.model import ModelConfig

EMBED_TOKENS = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
SCALE_SUFFIX = "_scale_inv"


@dataclass(frozen=True, slots=True)
class GatedMlpNames:
    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class MoeNames:
    """The tensors of one MoE layer. `block` is the full name of the module that holds them."""

    block: str
    parts: GatedMlpNames
    fused: bool

    @property
    def router(self) -> str:
        return f"{self.block}.gate.weight"

    @property
    def correction_bias(self) -> str:
        return f"{self.block}.gate.e_score_correction_bias"

    @property
    def shared(self) -> GatedMlpNames:
        return mlp_names(f"{self.block}.shared_experts")

    @property
    def fused_gate_up(self) -> str:
        return f"{self.block}.experts.gate_up_proj"  # [num_experts, 2 · moe_intermediate, hidden]

    @property
    def fused_down(self) -> str:
        return f"{self.block}.experts.down_proj"  # [num_experts, hidden, moe_intermediate]

    def expert(self, expert: int) -> GatedMlpNames:
        stem, parts = f"{self.block}.experts.{expert}", self.parts
        names = (f"{stem}.{part}.weight" for part in (parts.gate, parts.up, parts.down))
        return GatedMlpNames(*names)


_PARTS = GatedMlpNames("gate_proj", "up_proj", "down_proj")
_MIXTRAL_PARTS = GatedMlpNames("w1", "w3", "w2")


def layer_name(layer_id: int, part: str) -> str:
    return f"model.layers.{layer_id}.{part}"


def attention_name(layer_id: int, part: str) -> str:
    return layer_name(layer_id, f"self_attn.{part}")


def mlp_names(block: str) -> GatedMlpNames:
    return GatedMlpNames(*(f"{block}.{p}.weight" for p in ("gate_proj", "up_proj", "down_proj")))


def dense_mlp_names(layer_id: int) -> GatedMlpNames:
    return mlp_names(layer_name(layer_id, "mlp"))


def moe_names(config: ModelConfig, layer_id: int, present: Container[str]) -> MoeNames:
    """The names that this layer's experts go by in a checkpoint with the tensors `present`."""
    fused = MoeNames(layer_name(layer_id, "mlp"), _PARTS, fused=True)
    if fused.fused_gate_up in present:
        return fused
    if config.model_type == "mixtral":
        return MoeNames(layer_name(layer_id, "block_sparse_moe"), _MIXTRAL_PARTS, fused=False)
    return MoeNames(layer_name(layer_id, "mlp"), _PARTS, fused=False)
