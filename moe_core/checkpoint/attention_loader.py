"""Loads what one process of the attention tier holds: everything but the routed experts.

Knows which slice of which tensor an attention TP rank computes with; knows neither files nor
arithmetic. Slices of heads are head-aligned, because heads are a projection's outer dimension.
"""

import torch

from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.expected import COLUMNS, ROWS
from moe_core.checkpoint.names import (
    EMBED_TOKENS,
    FINAL_NORM,
    LM_HEAD,
    GatedMlpNames,
    attention_name,
    dense_mlp_names,
    layer_name,
    moe_names,
)
from moe_core.checkpoint.progress import Progress, no_progress
from moe_core.checkpoint.source import Cut, TensorSource, even_cut
from moe_core.config.model import MlaConfig, ModelConfig
from moe_core.model.matrix_forms import MatrixForm, in_form
from moe_core.model.weight_forms import layer_in_form
from moe_core.model.weights import (
    AttentionTierWeights,
    GqaWeights,
    LayerWeights,
    MlaWeights,
    MlpWeights,
    RouterWeights,
)

Tensor = torch.Tensor


def load_attention_weights(
    checkpoint: Checkpoint,
    *,
    tp_rank: int,
    tp_size: int,
    shared_expert: bool,
    dtype: torch.dtype,
    device: torch.device,
    form: MatrixForm = MatrixForm.PLAIN,
    progress: Progress = no_progress,
) -> AttentionTierWeights:
    """The weights of one attention TP rank; `shared_expert` says that this tier runs those. Its
    matrices are brought into `form`.

    Progress counts layers. Raises CheckpointError naming the tensor that cannot be used and
    ConfigError where `tp_size` does not divide heads or widths.
    """
    with checkpoint.reader() as reader:
        source = TensorSource(checkpoint, reader, dtype, device)
        loader = _AttentionLoader(checkpoint, source, tp_rank, tp_size, shared_expert)
        return loader.load(progress, form)


def load_gated_mlp(
    source: TensorSource, names: GatedMlpNames, intermediate: int, rank: int, size: int, what: str
) -> MlpWeights:
    """The rank's share of the intermediate dimension of a gated MLP."""
    rows = even_cut(ROWS, intermediate, rank, size, what)
    columns = even_cut(COLUMNS, intermediate, rank, size, what)
    return MlpWeights(
        gate_proj=source.load(names.gate, rows),
        up_proj=source.load(names.up, rows),
        down_proj=source.load(names.down, columns),
    )


class _AttentionLoader:
    def __init__(
        self, checkpoint: Checkpoint, source: TensorSource, rank: int, size: int, shared: bool
    ) -> None:
        self._checkpoint = checkpoint
        self._config: ModelConfig = checkpoint.config
        self._source = source
        self._rank = rank
        self._size = size
        self._shared = shared

    def load(self, progress: Progress, form: MatrixForm) -> AttentionTierWeights:
        embed_tokens = self._source.load(EMBED_TOKENS, self._vocabulary_cut())
        layers = []
        for layer_id in range(self._config.num_hidden_layers):
            layer = self._layer(layer_id)
            layers.append(layer_in_form(layer, form))
            progress(layer_id + 1, self._config.num_hidden_layers)
        tied = self._config.tie_word_embeddings
        lm_head = embed_tokens if tied else self._source.load(LM_HEAD, self._vocabulary_cut())
        return AttentionTierWeights(
            embed_tokens=embed_tokens,
            layers=tuple(layers),
            norm=self._source.load(FINAL_NORM),
            lm_head=in_form(lm_head, form),
        )

    def _vocabulary_cut(self) -> Cut:
        """ceil(vocab / tp) rows for every rank as far as they reach."""
        vocabulary = self._config.vocab_size
        part = -(-vocabulary // self._size)
        start = min(self._rank * part, vocabulary)
        return Cut(ROWS, start, min(start + part, vocabulary))

    def _layer(self, layer_id: int) -> LayerWeights:
        mla = self._config.mla
        is_moe = self._config.is_moe_layer(layer_id)
        norm = layer_name(layer_id, "input_layernorm.weight")
        post_norm = layer_name(layer_id, "post_attention_layernorm.weight")
        return LayerWeights(
            input_layernorm=self._source.load(norm),
            post_attention_layernorm=self._source.load(post_norm),
            attention=self._gqa(layer_id) if mla is None else self._mla(layer_id, mla),
            mlp=None if is_moe else self._dense_mlp(layer_id),
            router=self._router(layer_id) if is_moe else None,
            shared_expert=self._shared_expert(layer_id) if is_moe else None,
        )

    def _gqa(self, layer_id: int) -> GqaWeights:
        config, head_dim = self._config, self._config.head_dim
        queries = self._heads(ROWS, head_dim)
        outputs = self._heads(COLUMNS, head_dim)
        keys = self._kv_heads(head_dim)
        bias, norm = config.attention_bias, config.use_qk_norm
        return GqaWeights(
            q_proj=self._part(layer_id, "q_proj.weight", queries),
            k_proj=self._part(layer_id, "k_proj.weight", keys),
            v_proj=self._part(layer_id, "v_proj.weight", keys),
            o_proj=self._part(layer_id, "o_proj.weight", outputs),
            q_bias=self._part(layer_id, "q_proj.bias", queries) if bias else None,
            k_bias=self._part(layer_id, "k_proj.bias", keys) if bias else None,
            v_bias=self._part(layer_id, "v_proj.bias", keys) if bias else None,
            o_bias=self._o_bias(layer_id),
            q_norm=self._part(layer_id, "q_norm.weight") if norm else None,
            k_norm=self._part(layer_id, "k_norm.weight") if norm else None,
        )

    def _mla(self, layer_id: int, mla: MlaConfig) -> MlaWeights:
        queries = self._heads(ROWS, mla.qk_head_dim)
        keys_and_values = self._heads(ROWS, mla.qk_nope_head_dim + mla.v_head_dim)
        compressed = mla.q_lora_rank is not None
        bias = self._config.attention_bias
        return MlaWeights(
            q_proj=None if compressed else self._part(layer_id, "q_proj.weight", queries),
            q_a_proj=self._part(layer_id, "q_a_proj.weight") if compressed else None,
            q_a_layernorm=self._part(layer_id, "q_a_layernorm.weight") if compressed else None,
            q_b_proj=self._part(layer_id, "q_b_proj.weight", queries) if compressed else None,
            kv_a_proj_with_mqa=self._part(layer_id, "kv_a_proj_with_mqa.weight"),
            kv_a_layernorm=self._part(layer_id, "kv_a_layernorm.weight"),
            kv_b_proj=self._part(layer_id, "kv_b_proj.weight", keys_and_values),
            o_proj=self._part(layer_id, "o_proj.weight", self._heads(COLUMNS, mla.v_head_dim)),
            q_a_proj_bias=self._part(layer_id, "q_a_proj.bias") if bias and compressed else None,
            kv_a_proj_bias=self._part(layer_id, "kv_a_proj_with_mqa.bias") if bias else None,
            o_proj_bias=self._o_bias(layer_id),
        )

    def _part(self, layer_id: int, part: str, cut: Cut | None = None) -> Tensor:
        return self._source.load(attention_name(layer_id, part), cut)

    def _heads(self, axis: int, width: int) -> Cut:
        """The rank's query heads, each `width` wide."""
        heads = self._config.local_heads(self._size)
        return Cut(axis, self._rank * heads * width, (self._rank + 1) * heads * width)

    def _kv_heads(self, width: int) -> Cut:
        """The rank's KV heads; ranks share one where there are fewer heads than ranks."""
        heads = self._config.local_kv_heads(self._size)
        first = self._rank * self._config.num_key_value_heads // self._size
        return Cut(ROWS, first * width, (first + heads) * width)

    def _o_bias(self, layer_id: int) -> Tensor | None:
        """Only rank 0's: the ranks' outputs are summed, and the bias belongs to the sum once."""
        if not self._config.o_proj_bias or self._rank > 0:
            return None
        return self._part(layer_id, "o_proj.bias")

    def _dense_mlp(self, layer_id: int) -> MlpWeights:
        intermediate = self._config.intermediate_size
        return self._gated_mlp(dense_mlp_names(layer_id), intermediate)

    def _shared_expert(self, layer_id: int) -> MlpWeights | None:
        moe = self._config.moe
        if not self._shared or not moe.n_shared_experts:
            return None
        names = moe_names(self._config, layer_id, self._checkpoint.tensors)
        return self._gated_mlp(names.shared, moe.shared_intermediate_size)

    def _gated_mlp(self, names: GatedMlpNames, intermediate: int) -> MlpWeights:
        what = "attention tensor-parallel"
        return load_gated_mlp(self._source, names, intermediate, self._rank, self._size, what)

    def _router(self, layer_id: int) -> RouterWeights:
        names = moe_names(self._config, layer_id, self._checkpoint.tensors)
        bias = None
        if self._config.moe.has_correction_bias:
            wide = torch.float64 if self._source.dtype == torch.float64 else torch.float32
            bias = self._source.load(names.correction_bias, dtype=wide)
        return RouterWeights(self._source.load(names.router), bias)
