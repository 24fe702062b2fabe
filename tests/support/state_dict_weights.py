"""AttentionTierWeights straight from a checkpoint's tensors, whole file in memory.

For tests of the model that must not depend on the loader. Knows tensor names and how TP cuts
them; knows no quantisation.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from moe_core.config.model import ModelConfig
from moe_core.model.weights import (
    AttentionTierWeights,
    ExpertLayerWeights,
    GqaWeights,
    LayerWeights,
    MlaWeights,
    MlpWeights,
    RouterWeights,
)


@dataclass(frozen=True, slots=True)
class StateDictWeights:
    config: ModelConfig
    tensors: dict[str, Tensor]
    tp_rank: int = 0
    tp_size: int = 1

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        dtype: torch.dtype = torch.float32,
        tp_rank: int = 0,
        tp_size: int = 1,
    ) -> "StateDictWeights":
        tensors: dict[str, Tensor] = {}
        for file in sorted(directory.glob("*.safetensors")):
            tensors.update(load_file(file))
        cast = {
            key: tensor if key.endswith("e_score_correction_bias") else tensor.to(dtype)
            for key, tensor in tensors.items()
        }
        return cls(ModelConfig.from_hf(directory), cast, tp_rank, tp_size)

    def attention_tier(self) -> AttentionTierWeights:
        embed = self.tensors["model.embed_tokens.weight"]
        head = embed if self.config.tie_word_embeddings else self.tensors["lm_head.weight"]
        part = -(-self.config.vocab_size // self.tp_size)
        rows = slice(self.tp_rank * part, (self.tp_rank + 1) * part)
        return AttentionTierWeights(
            embed_tokens=embed[rows],
            layers=tuple(self._layer(i) for i in range(self.config.num_hidden_layers)),
            norm=self.tensors["model.norm.weight"],
            lm_head=head[rows],
        )

    def experts(self) -> dict[int, ExpertLayerWeights]:
        """All experts of every MoE layer, uncut."""
        return {i: self._experts(i) for i in self.config.moe_layer_ids}

    def _layer(self, layer_id: int) -> LayerWeights:
        prefix = f"model.layers.{layer_id}."
        is_moe = self.config.is_moe_layer(layer_id)
        mlp = f"{prefix}mlp."
        return LayerWeights(
            input_layernorm=self.tensors[f"{prefix}input_layernorm.weight"],
            post_attention_layernorm=self.tensors[f"{prefix}post_attention_layernorm.weight"],
            attention=self._mla(layer_id) if self.config.mla else self._gqa(layer_id),
            mlp=None if is_moe else self._mlp(mlp),
            router=self._router(prefix) if is_moe else None,
            shared_expert=self._mlp(f"{mlp}shared_experts.")
            if is_moe and self.config.moe.n_shared_experts
            else None,
        )

    def _router(self, prefix: str) -> RouterWeights:
        gate = self.tensors.get(f"{prefix}mlp.gate.weight")
        if gate is None:
            gate = self.tensors[f"{prefix}block_sparse_moe.gate.weight"]
        return RouterWeights(gate, self.tensors.get(f"{prefix}mlp.gate.e_score_correction_bias"))

    def _mla(self, layer_id: int) -> MlaWeights:
        def whole(name: str) -> Tensor | None:
            return self.tensors.get(f"model.layers.{layer_id}.self_attn.{name}")

        def required(name: str) -> Tensor:
            return self.tensors[f"model.layers.{layer_id}.self_attn.{name}"]

        q_proj, q_b_proj = whole("q_proj.weight"), whole("q_b_proj.weight")
        return MlaWeights(
            q_proj=None if q_proj is None else self._part(q_proj, 0),
            q_a_proj=whole("q_a_proj.weight"),
            q_a_layernorm=whole("q_a_layernorm.weight"),
            q_b_proj=None if q_b_proj is None else self._part(q_b_proj, 0),
            kv_a_proj_with_mqa=required("kv_a_proj_with_mqa.weight"),
            kv_a_layernorm=required("kv_a_layernorm.weight"),
            kv_b_proj=self._part(required("kv_b_proj.weight"), 0),
            o_proj=self._part(required("o_proj.weight"), 1),
            q_a_proj_bias=whole("q_a_proj.bias"),
            kv_a_proj_bias=whole("kv_a_proj_with_mqa.bias"),
            o_proj_bias=whole("o_proj.bias"),
        )

    def _gqa(self, layer_id: int) -> GqaWeights:
        prefix = f"model.layers.{layer_id}.self_attn."

        def cut(name: str, *, kv: bool) -> Tensor | None:
            tensor = self.tensors.get(prefix + name)
            if tensor is None:
                return None
            return self._kv_part(tensor) if kv else self._part(tensor, 0)

        def required(name: str, *, kv: bool) -> Tensor:
            tensor = cut(name, kv=kv)
            assert tensor is not None, name
            return tensor

        return GqaWeights(
            q_proj=required("q_proj.weight", kv=False),
            k_proj=required("k_proj.weight", kv=True),
            v_proj=required("v_proj.weight", kv=True),
            o_proj=self._part(self.tensors[prefix + "o_proj.weight"], 1),
            q_bias=cut("q_proj.bias", kv=False),
            k_bias=cut("k_proj.bias", kv=True),
            v_bias=cut("v_proj.bias", kv=True),
            o_bias=self.tensors.get(prefix + "o_proj.bias"),
            q_norm=self.tensors.get(prefix + "q_norm.weight"),
            k_norm=self.tensors.get(prefix + "k_norm.weight"),
        )

    def _mlp(self, prefix: str) -> MlpWeights:
        return MlpWeights(
            gate_proj=self._part(self.tensors[f"{prefix}gate_proj.weight"], 0),
            up_proj=self._part(self.tensors[f"{prefix}up_proj.weight"], 0),
            down_proj=self._part(self.tensors[f"{prefix}down_proj.weight"], 1),
        )

    def _experts(self, layer_id: int) -> ExpertLayerWeights:
        mixtral = self.config.model_type == "mixtral"
        block = "block_sparse_moe" if mixtral else "mlp"
        names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")

        def stacked(name: str) -> Tensor:
            prefix = f"model.layers.{layer_id}.{block}.experts"
            every = range(self.config.moe.num_experts)
            return torch.stack([self.tensors[f"{prefix}.{e}.{name}.weight"] for e in every])

        gate, up, down = (stacked(name) for name in names)
        return ExpertLayerWeights(w13=torch.cat((gate, up), dim=1), w2=down, shared=None)

    def _part(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(self.tp_size, dim)[self.tp_rank].contiguous()

    def _kv_part(self, tensor: Tensor) -> Tensor:
        heads = self.config.num_key_value_heads
        if heads >= self.tp_size:
            return self._part(tensor, 0)
        return tensor.chunk(heads)[self.tp_rank * heads // self.tp_size].contiguous()
