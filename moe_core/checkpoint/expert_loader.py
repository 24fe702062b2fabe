"""Loads what one process of the expert tier holds: its slice of its own experts.

Knows which experts a placement gives to an EP group and which rows and columns an expert TP
rank computes with; knows neither files nor arithmetic. Every expert has tensors of its own, so that
one can be let go without the others; they are allocated once and each slice is copied in, so that
nothing is held twice but one slice.
"""

from dataclasses import dataclass

import torch

from moe_core.checkpoint.attention_loader import load_gated_mlp
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.expected import COLUMNS, ROWS
from moe_core.checkpoint.names import MoeNames, moe_names
from moe_core.checkpoint.progress import Progress, no_progress
from moe_core.checkpoint.source import Cut, TensorSource, even_cut
from moe_core.errors import ConfigError
from moe_core.model.matrix_forms import MatrixForm
from moe_core.model.weight_forms import expert_in_form, mlp_in_form
from moe_core.model.weights import ExpertLayerWeights, ExpertWeights, MlpWeights
from moe_core.placement import ExpertPlacement

Tensor = torch.Tensor
_WHAT = "expert tensor-parallel"


@dataclass(frozen=True, slots=True)
class ExpertShard:
    """How one process holds each of its experts: which expert TP part of it, in which type, where,
    and with its matrices in which form."""

    etp_rank: int
    etp_size: int
    dtype: torch.dtype
    device: torch.device
    form: MatrixForm = MatrixForm.PLAIN


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
    form: MatrixForm = MatrixForm.PLAIN,
    progress: Progress = no_progress,
) -> dict[int, ExpertLayerWeights]:
    """By layer: the experts that `placement` gives to `ep_rank`, in slot order; none for an
    `ep_rank` beyond its ep_size.

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
    shard = ExpertShard(etp_rank, etp_size, dtype, device, form)
    with checkpoint.reader() as reader:
        loader = _ExpertLoader(checkpoint, TensorSource(checkpoint, reader, dtype, device), shard)
        for layer in placement.layers:
            experts = layer.logical_experts(ep_rank)
            loaded[layer.layer_id] = loader.layer(layer.layer_id, experts, shared_expert)
            progress(len(loaded), len(placement.layers))
    return loaded


def load_expert(
    checkpoint: Checkpoint, shard: ExpertShard, layer_id: int, expert: int
) -> ExpertWeights:
    """One logical expert of one layer. Raises as `load_expert_weights`."""
    with checkpoint.reader() as reader:
        source = TensorSource(checkpoint, reader, shard.dtype, shard.device)
        return _ExpertLoader(checkpoint, source, shard).expert(layer_id, expert)


class _ExpertLoader:
    def __init__(self, checkpoint: Checkpoint, source: TensorSource, shard: ExpertShard) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._source = source
        self._form = shard.form
        self._rank, self._size = shard.etp_rank, shard.etp_size
        intermediate = self._config.moe.moe_intermediate_size
        self._rows = even_cut(ROWS, intermediate, self._rank, self._size, _WHAT)
        self._columns = even_cut(COLUMNS, intermediate, self._rank, self._size, _WHAT)

    def layer(
        self, layer_id: int, experts: tuple[int, ...], shared_expert: bool
    ) -> ExpertLayerWeights:
        held = [self.expert(layer_id, expert) for expert in experts]
        shared = self._shared(layer_id) if shared_expert else None
        return ExpertLayerWeights(
            tuple(each.w13 for each in held), tuple(each.w2 for each in held), shared
        )

    def expert(self, layer_id: int, expert: int) -> ExpertWeights:
        names = self._names(layer_id)
        hidden, part = self._config.hidden_size, self._rows.stop - self._rows.start
        w13, w2 = self._empty(2 * part, hidden), self._empty(hidden, part)
        self._copy_expert(names, expert, w13, w2)
        weights = ExpertWeights(w13, w2)
        return expert_in_form(weights, self._form)

    def _names(self, layer_id: int) -> MoeNames:
        return moe_names(self._config, layer_id, self._checkpoint.tensors)

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

    def _shared(self, layer_id: int) -> MlpWeights | None:
        moe = self._config.moe
        if not moe.n_shared_experts:
            return None
        names, intermediate = self._names(layer_id).shared, moe.shared_intermediate_size
        mlp = load_gated_mlp(self._source, names, intermediate, self._rank, self._size, _WHAT)
        return mlp_in_form(mlp, self._form)
