"""A decoder whose routed experts are somewhere else.

Knows everything of the model except the routed experts: a layer is two pure functions, one up
to the router's choice and one that takes the experts' output. Knows no process, no transport
and no scheduler; who computes the experts is the caller's.

    hidden = decoder.embed(token_ids)
    for layer in decoder.layers:
        residual, hidden_states = layer.attend(hidden, batch, cache)
        if layer.is_moe:
            topk_ids, topk_weights = layer.route(hidden_states)
            routed = …  # the caller's experts, [n, hidden_size]
            hidden = layer.finish(residual, routed, layer.shared(hidden_states))
        else:
            hidden = layer.dense(residual, hidden_states)
    logits = decoder.logits(hidden[last_rows])
"""

from torch import Tensor

from moe_core.config.model import ModelConfig
from moe_core.model.batch import AttentionBatch
from moe_core.model.gqa import GqaAttention
from moe_core.model.kv_cache import KvCache, LatentKv
from moe_core.model.layers import embed, gated_mlp, rms_norm, vocab_logits
from moe_core.model.linear import activation_dtype
from moe_core.model.mla import MlaAttention
from moe_core.model.rotary import Rotary
from moe_core.model.router import Router
from moe_core.model.tensor_parallel import TensorParallel
from moe_core.model.weights import AttentionTierWeights, LayerWeights, MlaWeights


class DecoderLayer:
    """One layer; every tensor is replicated over the TP group except what is inside attend."""

    def __init__(
        self,
        config: ModelConfig,
        layer_id: int,
        weights: LayerWeights,
        enable_mla: bool,
        rotary: Rotary,
        tp: TensorParallel,
    ) -> None:
        if (weights.router is not None) is not config.is_moe_layer(layer_id):
            raise ValueError(f"layer {layer_id}: {config.moe_layer_ids=} but the weights disagree")
        if (weights.router is None) is (weights.mlp is None):
            raise ValueError(f"layer {layer_id} needs exactly one of a router and an mlp")
        self.layer_id = layer_id
        self.dtype = weights.input_layernorm.dtype  # the model's, in which experts are asked
        self._weights = weights
        self._enable_mla = enable_mla
        self._eps = config.rms_norm_eps
        self._tp = tp
        self._router = None if weights.router is None else Router(config.moe, weights.router)
        self._attention = _attention(config, weights, rotary, tp)

    @property
    def is_moe(self) -> bool:
        return self._router is not None

    def attend(
        self, hidden: Tensor, batch: AttentionBatch, cache: KvCache
    ) -> tuple[Tensor, Tensor]:
        """hidden [n, hidden_size] to (residual, hidden_states), both [n, hidden_size]: the sum
        after attention, and its post_attention_layernorm. Writes the layer's cache."""
        layer_cache = cache.layers[self.layer_id]
        if isinstance(layer_cache, LatentKv) is not self._enable_mla:
            raise TypeError(f"enable_mla={self._enable_mla} but the cache is the other kind")
        normed = rms_norm(hidden, self._weights.input_layernorm, self._eps)
        residual = hidden + self._attention(normed, batch, layer_cache)
        return residual, rms_norm(residual, self._weights.post_attention_layernorm, self._eps)

    def route(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """topk_ids [n, k] int64 (logical) and topk_weights [n, k] float32, float64 in it."""
        if self._router is None:
            raise ValueError(f"layer {self.layer_id} is dense: it has no router")
        return self._router(hidden_states)

    def shared(self, hidden_states: Tensor) -> Tensor | None:
        """The shared experts' output [n, hidden_size], all-reduced; None where not held here."""
        if self._weights.shared_expert is None:
            return None
        return gated_mlp(hidden_states, self._weights.shared_expert, self._tp)

    def finish(self, residual: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        """Adds the experts' outputs [n, hidden_size]; routed may be more precise than the model."""
        experts = routed if shared is None else routed + shared
        return residual + experts.to(residual.dtype)

    def dense(self, residual: Tensor, hidden_states: Tensor) -> Tensor:
        """The rest of a layer without experts."""
        if self._weights.mlp is None:
            raise ValueError(f"layer {self.layer_id} is a MoE layer: it has no dense MLP")
        return residual + gated_mlp(hidden_states, self._weights.mlp, self._tp)


class Decoder:
    def __init__(
        self,
        config: ModelConfig,
        weights: AttentionTierWeights,
        enable_mla: bool,
        tp: TensorParallel,
    ) -> None:
        """Raises ValueError where config, weights and enable_mla do not fit each other."""
        if enable_mla and config.mla is None:
            raise ValueError(f"enable_mla on {config.model_type}, which has no MLA")
        if len(weights.layers) != config.num_hidden_layers:
            raise ValueError(f"{len(weights.layers)} layers, expected {config.num_hidden_layers}")
        self.config = config
        self._weights = weights
        self._tp = tp
        self._activations = activation_dtype(weights.norm.dtype, weights.norm.device)
        rotary = Rotary(config, weights.norm.dtype, weights.norm.device)
        self.layers = tuple(
            DecoderLayer(config, layer_id, layer, enable_mla, rotary, tp)
            for layer_id, layer in enumerate(weights.layers)
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [n] to hidden [n, hidden_size]."""
        rows = embed(token_ids, self._weights.embed_tokens, self.config.vocab_size, self._tp)
        return rows.to(self._activations)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [m, hidden_size] of the last layer to [m, vocab_size], float32 or float64."""
        normed = rms_norm(hidden, self._weights.norm, self.config.rms_norm_eps)
        return vocab_logits(normed, self._weights.lm_head, self.config.vocab_size, self._tp)


def _attention(
    config: ModelConfig, weights: LayerWeights, rotary: Rotary, tp: TensorParallel
) -> MlaAttention | GqaAttention:
    if isinstance(weights.attention, MlaWeights):
        if config.mla is None:
            raise ValueError(f"MLA weights for {config.model_type}, which has no MLA")
        return MlaAttention(config, config.mla, weights.attention, rotary, tp)
    return GqaAttention(config, weights.attention, rotary, tp)
