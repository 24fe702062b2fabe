"""An expert tier in this process, and the loop that says what it must compute.

The weights are made for the whole model and cut as the placement and expert TP say, so that
every layout computes the same function.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from expert_service.batcher import Batcher
from expert_service.expert_runner import ExpertRunner
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.model.experts import run_experts_by_loop
from moe_core.model.weights import ExpertLayerWeights, MlpWeights
from moe_core.placement import ExpertPlacement
from moe_core.transport.base import LinkSpec

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Routing:
    """One batch of one layer: hidden [n, H], topk_ids [n, k] int64, topk_weights [n, k] f32."""

    hidden: Tensor
    topk_ids: Tensor
    topk_weights: Tensor


def random_routing(model: ModelConfig, num_tokens: int, dtype: torch.dtype, seed: int) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    moe = model.moe
    scores = torch.rand(num_tokens, moe.num_experts, generator=generator)
    top = scores.topk(moe.num_experts_per_tok, dim=-1)
    hidden = torch.randn(num_tokens, model.hidden_size, generator=generator, dtype=torch.float64)
    return Routing(hidden.to(dtype), top.indices, top.values)


def whole_layer(model: ModelConfig, layer_id: int, dtype: torch.dtype) -> ExpertLayerWeights:
    """All logical experts of one layer in order, and the shared expert if the model has one."""
    generator = torch.Generator().manual_seed(1000 + layer_id)
    hidden, width = model.hidden_size, model.moe.moe_intermediate_size

    def matrix(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (values / shape[-1] ** 0.5).to(dtype)

    w13 = matrix(model.moe.num_experts, 2 * width, hidden)
    w2 = matrix(model.moe.num_experts, hidden, width)
    shared_width = model.moe.n_shared_experts * width
    shared = MlpWeights(
        matrix(shared_width, hidden), matrix(shared_width, hidden), matrix(hidden, shared_width)
    )
    return ExpertLayerWeights(w13, w2, shared if shared_width else None)


def cut_layer(
    whole: ExpertLayerWeights, held: tuple[int, ...], etp_rank: int, etp_size: int, shared: bool
) -> ExpertLayerWeights:
    """What one expert process holds: the experts `held`, in that order, its share of each."""

    def rows(matrix: Tensor) -> Tensor:
        return matrix.chunk(etp_size, dim=-2)[etp_rank].contiguous()

    def columns(matrix: Tensor) -> Tensor:
        return matrix.chunk(etp_size, dim=-1)[etp_rank].contiguous()

    gate, up = whole.w13[list(held)].chunk(2, dim=1)
    mlp = whole.shared
    cut = mlp and MlpWeights(rows(mlp.gate_proj), rows(mlp.up_proj), columns(mlp.down_proj))
    return ExpertLayerWeights(
        w13=torch.cat((rows(gate), rows(up)), dim=1),
        w2=columns(whole.w2[list(held)]),
        shared=cut if shared else None,
    )


def make_batchers(
    model: ModelConfig, parallel: ParallelConfig, placement: ExpertPlacement, dtype: torch.dtype
) -> list[Batcher]:
    """One per expert process, in rank order. Needs a running event loop."""
    whole = {layer_id: whole_layer(model, layer_id, dtype) for layer_id in model.moe_layer_ids}
    batchers = []
    for rank in range(parallel.expert_devices):
        ep_rank, etp_rank = parallel.expert_ranks(rank)
        weights = {
            layer.layer_id: cut_layer(
                whole[layer.layer_id],
                layer.logical_experts(ep_rank),
                etp_rank,
                parallel.etp_size,
                parallel.shared_on_experts,
            )
            for layer in placement.layers
        }
        batchers.append(Batcher(ExpertRunner(weights, placement, ep_rank, CPU)))
    return batchers


def expected_output(
    model: ModelConfig, layer_id: int, routing: Routing, shared_on_experts: bool
) -> Tensor:
    """The layer in one process, one token and one expert at a time."""
    ids, weights = routing.topk_ids, routing.topk_weights
    if shared_on_experts:
        ids = torch.nn.functional.pad(ids, (0, 1), value=model.moe.num_experts)
        weights = torch.nn.functional.pad(weights, (0, 1), value=1.0)
    whole = whole_layer(model, layer_id, routing.hidden.dtype)
    return run_experts_by_loop(whole, routing.hidden, ids, weights)


def make_spec(
    model: ModelConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    slot_tokens: int = 64,
    slot_count: int = 3,
) -> LinkSpec:
    columns = model.moe.num_experts_per_tok + parallel.shared_on_experts
    return LinkSpec("test", dtype, model.hidden_size, columns, slot_tokens, slot_count)
