"""Loads what one process of the expert tier holds: its slice of its own experts.

Knows which experts a placement gives to an EP group and which rows and columns an expert TP
rank computes with; knows neither files nor arithmetic. A layer's stacked tensors are allocated
once and each expert's slice is copied in, so that nothing is held twice but one tensor.
"""

import torch

from moe_core.checkpoint.attention_loader import load_gated_mlp
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.expected import COLUMNS, ROWS
from moe_core.checkpoint.names import MoeNames, moe_names
from moe_core.checkpoint.progress import Progress, no_progress
from moe_core.checkpoint.source import Cut, TensorSource, even_cut
from moe_core.errors import ConfigError
from moe_core.model.packing import packed_experts
from moe_core.model.weights import ExpertLayerWeights, MlpWeights
from moe_core.placement import ExpertPlacement

Tensor = torch.Tensor
_WHAT = "expert tensor-parallel"


def load_expert_weights(
    checkpoint: Checkpoint,
    *,
    placement: ExpertPlacement,
    ep_rank: int,
    etp_rank: int,
    etp_size: int,
    shared_expert: bool,
    dtype: torch.dtype,
    device: torch.device,
    packed: bool = False,
    progress: Progress = no_progress,
) -> dict[int, ExpertLayerWeights]:
    """By layer: the experts that `placement` gives to `ep_rank`, in slot order, `packed` (see
    moe_core/model/linear.py) or as they are stored.

    Progress counts layers. Raises CheckpointError naming the tensor that cannot be used and
    ConfigError where `etp_size` does not divide the experts' width or the placement is of
    another model.
    """
    config = checkpoint.config
    placed = tuple(layer.layer_id for layer in placement.layers)
    if placed != config.moe_layer_ids or placement.num_logical_experts != config.moe.num_experts:
        rule = f"must place {config.moe.num_experts} experts on layers {config.moe_layer_ids}"
        value = f"{placement.num_logical_experts} experts on layers {placed}"
        raise ConfigError("placement", value, rule)
    loaded: dict[int, ExpertLayerWeights] = {}
    with checkpoint.reader() as reader:
        source = TensorSource(checkpoint, reader, dtype, device)
        loader = _ExpertLoader(checkpoint, source, etp_rank, etp_size)
        for layer in placement.layers:
            experts = layer.logical_experts(ep_rank)
            weights = loader.layer(layer.layer_id, experts, shared_expert)
            loaded[layer.layer_id] = packed_experts(weights) if packed else weights
            progress(len(loaded), len(placement.layers))
    return loaded


class _ExpertLoader:
    def __init__(self, checkpoint: Checkpoint, source: TensorSource, rank: int, size: int) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._source = source
        self._rank = rank
        self._size = size
        intermediate = self._config.moe.moe_intermediate_size
        self._rows = even_cut(ROWS, intermediate, rank, size, _WHAT)
        self._columns = even_cut(COLUMNS, intermediate, rank, size, _WHAT)

    def layer(
        self, layer_id: int, experts: tuple[int, ...], shared_expert: bool
    ) -> ExpertLayerWeights:
        names = moe_names(self._config, layer_id, self._checkpoint.tensors)
        hidden, part = self._config.hidden_size, self._rows.stop - self._rows.start
        w13 = self._empty(len(experts), 2 * part, hidden)
        w2 = self._empty(len(experts), hidden, part)
        for local, expert in enumerate(experts):
            self._copy_expert(names, expert, w13[local], w2[local])
        return ExpertLayerWeights(w13, w2, self._shared(names) if shared_expert else None)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._source.dtype, device=self._source.device)

    def _copy_expert(self, names: MoeNames, expert: int, w13: Tensor, w2: Tensor) -> None:
        """Into w13 [2 · intermediate/etp, hidden] and w2 [hidden, intermediate/etp]."""
        if names.fused:
            self._copy_fused(names, expert, w13, w2)
            return
        gate, up = w13.chunk(2)
        expert_names = names.expert(expert)
        gate.copy_(self._source.load(expert_names.gate, self._rows))
        up.copy_(self._source.load(expert_names.up, self._rows))
        w2.copy_(self._source.load(expert_names.down, self._columns))

    def _copy_fused(self, names: MoeNames, expert: int, w13: Tensor, w2: Tensor) -> None:
        w2.copy_(self._source.load(names.fused_down, self._columns, expert=expert))
        if self._size == 1:
            w13.copy_(self._source.load(names.fused_gate_up, expert=expert))
            return
        gate, up = w13.chunk(2)
        offset = self._config.moe.moe_intermediate_size
        up_rows = Cut(ROWS, offset + self._rows.start, offset + self._rows.stop)
        gate.copy_(self._source.load(names.fused_gate_up, self._rows, expert=expert))
        up.copy_(self._source.load(names.fused_gate_up, up_rows, expert=expert))

    def _shared(self, names: MoeNames) -> MlpWeights | None:
        moe = self._config.moe
        if not moe.n_shared_experts:
            return None
        intermediate = moe.shared_intermediate_size
        return load_gated_mlp(
            self._source, names.shared, intermediate, self._rank, self._size, _WHAT
        )
