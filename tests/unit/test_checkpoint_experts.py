"""What expert processes load: their experts' slices in slot order, and no bytes besides."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.expert_loader import load_expert_weights
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ConfigError
from moe_core.placement import ExpertPlacement
from support.checkpoint_files import (
    CPU,
    Tensors,
    check_gated_mlp,
    deepseek_config,
    fused,
    load_attention,
    load_experts,
    made,
    random_tensors,
    routed_bytes,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def deepseek(root: Path) -> tuple[Checkpoint, Tensors]:
    return made(root, deepseek_config())


def stacked(tensors: Tensors, layer_id: int, chosen: list[int]) -> tuple[Tensor, Tensor]:
    stem = f"model.layers.{layer_id}.mlp.experts"
    both = [
        torch.cat([tensors[f"{stem}.{e}.{p}.weight"] for p in ("gate_proj", "up_proj")])
        for e in chosen
    ]
    return torch.stack(both), torch.stack([tensors[f"{stem}.{e}.down_proj.weight"] for e in chosen])


def test_an_expert_process_holds_its_experts_in_slot_order(
    deepseek: tuple[Checkpoint, Tensors],
) -> None:
    checkpoint, tensors = deepseek
    for rank in range(4):
        loaded = load_experts(checkpoint, rank, ep=4)
        assert list(loaded) == [1, 2]
        for layer_id, weights in loaded.items():
            w13, w2 = stacked(tensors, layer_id, [2 * rank, 2 * rank + 1])
            assert torch.equal(torch.stack(weights.w13), w13)
            assert torch.equal(torch.stack(weights.w2), w2)
            assert weights.shared is None


def test_redundant_experts_are_loaded_where_the_placement_puts_them(
    deepseek: tuple[Checkpoint, Tensors],
) -> None:
    checkpoint, tensors = deepseek
    parallel = ParallelConfig(expert_devices=2, ep_size=2, num_redundant_experts=4)
    placement = ExpertPlacement.initial(checkpoint.config, parallel)
    for rank in range(2):
        loaded = load_experts(checkpoint, rank, ep=2, redundant=4)
        w13, w2 = stacked(tensors, 1, list(placement.layer(1).logical_experts(rank)))
        assert len(loaded[1].w13) == 6
        assert torch.equal(torch.stack(loaded[1].w13), w13)
        assert torch.equal(torch.stack(loaded[1].w2), w2)


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("etp", [1, 2, 4])
def test_expert_slices_of_all_ranks_are_the_whole(root: Path, is_fused: bool, etp: int) -> None:
    config = deepseek_config()
    tensors = random_tensors(config)
    stored = fused(tensors, ModelConfig.from_hf(config)) if is_fused else tensors
    checkpoint = Checkpoint.open(write_checkpoint(root / f"{is_fused}-{etp}", config, stored))
    parts = [load_experts(checkpoint, rank, etp=etp, shared=True) for rank in range(etp)]
    for layer_id in (1, 2):
        w13, w2 = stacked(tensors, layer_id, list(range(8)))
        held = [part[layer_id] for part in parts]
        gate_up = [torch.stack(weights.w13).view(8, 2, 16 // etp, 32) for weights in held]
        assert torch.equal(torch.cat(gate_up, 2).view(8, 32, 32), w13)
        assert torch.equal(torch.cat([torch.stack(weights.w2) for weights in held], 2), w2)
        shared = [weights.shared for weights in held]
        check_gated_mlp(shared, tensors, f"model.layers.{layer_id}.mlp.shared_experts")


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("devices", [4, 8])
def test_an_expert_process_reads_its_share_of_the_routed_experts_and_nothing_else(
    root: Path, is_fused: bool, devices: int
) -> None:
    config = deepseek_config()
    tensors = random_tensors(config)
    stored = fused(tensors, ModelConfig.from_hf(config)) if is_fused else tensors
    directory = write_checkpoint(root / f"share-{is_fused}-{devices}", config, stored)
    for rank in range(devices):
        checkpoint = Checkpoint.open(directory)
        assert checkpoint.bytes_read == 0
        load_experts(checkpoint, rank, ep=4, etp=devices // 4)
        assert checkpoint.bytes_read * devices == routed_bytes(tensors)


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
)
def test_values_are_converted_once_to_the_chosen_type(
    root: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    name = str(stored).removeprefix("torch.")
    config = deepseek_config(torch_dtype=name)
    tensors = random_tensors(config, stored)
    bias_name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[bias_name] = tensors[bias_name].float() + 1e-4
    checkpoint = Checkpoint.open(write_checkpoint(root / f"{stored}-{wanted}", config, tensors))
    weights, held = load_attention(checkpoint, dtype=wanted), load_experts(checkpoint, dtype=wanted)
    assert torch.equal(weights.embed_tokens, tensors["model.embed_tokens.weight"].to(wanted))
    assert torch.equal(torch.stack(held[1].w2), stacked(tensors, 1, list(range(8)))[1].to(wanted))
    router = weights.layers[1].router
    assert router is not None
    assert router.e_score_correction_bias is not None
    exact = torch.float64 if wanted == torch.float64 else torch.float32
    assert router.e_score_correction_bias.dtype == exact
    assert torch.equal(router.e_score_correction_bias, tensors[bias_name].to(exact))


def test_a_placement_of_another_model_is_refused(root: Path) -> None:
    checkpoint, _ = made(root, deepseek_config())
    other, _ = made(root, deepseek_config(n_routed_experts=16))
    placement = ExpertPlacement.initial(other.config, ParallelConfig())
    with pytest.raises(ConfigError, match=r"placement='16 experts on layers \(1, 2\)'"):
        load_expert_weights(
            checkpoint,
            placement=placement,
            ep_rank=0,
            etp_rank=0,
            etp_size=1,
            shared_expert=False,
            dtype=torch.float32,
            device=CPU,
        )
