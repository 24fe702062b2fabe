"""What each rank loads: its slices, all of them together the whole model, and no bytes besides."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_core.checkpoint.attention_loader import load_attention_weights
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.expert_loader import load_expert_weights
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ConfigError
from moe_core.model.weights import (
    AttentionTierWeights,
    ExpertLayerWeights,
    GqaWeights,
    LayerWeights,
    MlaWeights,
    MlpWeights,
)
from moe_core.placement import ExpertPlacement
from support.checkpoint_files import (
    CPU,
    Json,
    Tensors,
    deepseek_config,
    fused,
    qwen_config,
    random_tensors,
    specs,
    write_checkpoint,
)

MLP = ("gate_proj", "up_proj", "down_proj")


def attention(
    checkpoint: Checkpoint,
    rank: int = 0,
    size: int = 1,
    *,
    shared: bool = True,
    dtype: torch.dtype = torch.float32,
) -> AttentionTierWeights:
    return load_attention_weights(
        checkpoint, tp_rank=rank, tp_size=size, shared_expert=shared, dtype=dtype, device=CPU
    )


def experts(
    checkpoint: Checkpoint,
    rank: int = 0,
    *,
    devices: int = 1,
    ep: int = 1,
    redundant: int = 0,
    shared: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[int, ExpertLayerWeights]:
    parallel = ParallelConfig(
        expert_devices=devices, ep_size=ep, num_redundant_experts=redundant
    ).with_model(checkpoint.config)
    ep_rank, etp_rank = parallel.expert_ranks(rank)
    return load_expert_weights(
        checkpoint,
        placement=ExpertPlacement.initial(checkpoint.config, parallel),
        ep_rank=ep_rank,
        etp_rank=etp_rank,
        etp_size=parallel.etp_size,
        shared_expert=shared,
        dtype=dtype,
        device=CPU,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def made(root: Path, config: Json) -> tuple[Checkpoint, Tensors]:
    tensors = random_tensors(config)
    directory = root / f"made-{len(list(root.iterdir()))}"
    return Checkpoint.open(write_checkpoint(directory, config, tensors, num_files=2)), tensors


@pytest.fixture
def deepseek(root: Path) -> tuple[Checkpoint, Tensors]:
    return made(root, deepseek_config())


def joined(parts: list[Tensor | None], dim: int) -> Tensor:
    return torch.cat([part for part in parts if part is not None], dim)


def layer_parts(parts: list[AttentionTierWeights], layer_id: int) -> list[LayerWeights]:
    return [part.layers[layer_id] for part in parts]


def check_mlp(parts: list[MlpWeights | None], tensors: Tensors, stem: str) -> None:
    for name, dim in zip(MLP, (0, 0, 1), strict=True):
        whole = joined([getattr(part, name) for part in parts], dim)
        assert torch.equal(whole, tensors[f"{stem}.{name}.weight"])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_mla_slices_of_all_ranks_are_the_whole(
    deepseek: tuple[Checkpoint, Tensors], tp: int
) -> None:
    checkpoint, tensors = deepseek
    parts = [attention(checkpoint, rank, tp) for rank in range(tp)]
    for layer_id in range(3):
        stem = f"model.layers.{layer_id}.self_attn"
        held = [layer.attention for layer in layer_parts(parts, layer_id)]
        assert all(isinstance(weights, MlaWeights) for weights in held)
        for name, dim in (("q_b_proj", 0), ("kv_b_proj", 0), ("o_proj", 1)):
            whole = joined([getattr(weights, name) for weights in held], dim)
            assert torch.equal(whole, tensors[f"{stem}.{name}.weight"])
        for name in ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm"):
            for weights in held:
                assert torch.equal(getattr(weights, name), tensors[f"{stem}.{name}.weight"])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_mlp_slices_of_all_ranks_are_the_whole(
    deepseek: tuple[Checkpoint, Tensors], tp: int
) -> None:
    checkpoint, tensors = deepseek
    parts = [attention(checkpoint, rank, tp) for rank in range(tp)]
    check_mlp([p.mlp for p in layer_parts(parts, 0)], tensors, "model.layers.0.mlp")
    shared = [p.shared_expert for p in layer_parts(parts, 1)]
    check_mlp(shared, tensors, "model.layers.1.mlp.shared_experts")


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_vocabulary_is_cut_into_equal_parts_with_a_shorter_last(
    deepseek: tuple[Checkpoint, Tensors], tp: int
) -> None:
    checkpoint, tensors = deepseek
    parts = [attention(checkpoint, rank, tp) for rank in range(tp)]
    assert {p.embed_tokens.shape[0] for p in parts[:-1]} <= {-(-61 // tp)}
    assert torch.equal(
        joined([p.embed_tokens for p in parts], 0), tensors["model.embed_tokens.weight"]
    )
    assert torch.equal(joined([p.lm_head for p in parts], 0), tensors["lm_head.weight"])


def test_a_vocabulary_smaller_than_its_parts_leaves_the_last_rank_none(root: Path) -> None:
    checkpoint, tensors = made(root, deepseek_config(vocab_size=9))
    parts = [attention(checkpoint, rank, 4) for rank in range(4)]
    assert [part.embed_tokens.shape[0] for part in parts] == [3, 3, 3, 0]
    assert torch.equal(joined([p.lm_head for p in parts], 0), tensors["lm_head.weight"])


@pytest.mark.parametrize(
    ("tp", "kv_heads"), [(1, [[0, 1]]), (2, [[0], [1]]), (4, [[0], [0], [1], [1]])]
)
def test_kv_heads_are_cut_or_replicated(root: Path, tp: int, kv_heads: list[list[int]]) -> None:
    checkpoint, tensors = made(root, qwen_config(attention_bias=True))
    parts = [attention(checkpoint, rank, tp) for rank in range(tp)]
    stem = "model.layers.1.self_attn"
    held = [layer.attention for layer in layer_parts(parts, 1)]
    for weights, heads in zip(held, kv_heads, strict=True):
        assert isinstance(weights, GqaWeights)
        for name in ("k", "v"):
            rows = tensors[f"{stem}.{name}_proj.weight"].view(2, 8, 32)[heads].flatten(0, 1)
            bias = tensors[f"{stem}.{name}_proj.bias"].view(2, 8)[heads].flatten()
            assert torch.equal(getattr(weights, f"{name}_proj"), rows)
            assert torch.equal(getattr(weights, f"{name}_bias"), bias)
        for name in ("q_norm", "k_norm"):
            assert torch.equal(getattr(weights, name), tensors[f"{stem}.{name}.weight"])
    for name, dim in (("q_proj", 0), ("o_proj", 1)):
        whole = joined([getattr(weights, name) for weights in held], dim)
        assert torch.equal(whole, tensors[f"{stem}.{name}.weight"])


def test_only_the_first_rank_holds_the_bias_of_the_summed_output(root: Path) -> None:
    for config in (qwen_config(attention_bias=True), deepseek_config(attention_bias=True)):
        checkpoint, _ = made(root, config)
        biases = []
        for rank in range(2):
            weights = attention(checkpoint, rank, 2).layers[0].attention
            is_mla = isinstance(weights, MlaWeights)
            biases.append(weights.o_proj_bias if is_mla else weights.o_bias)
        assert biases[0] is not None
        assert biases[1] is None


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_is_the_embedding_itself(root: Path, stored: bool) -> None:
    config = deepseek_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    if not stored:
        del tensors["lm_head.weight"]
    checkpoint = Checkpoint.open(write_checkpoint(root / f"tied-{stored}", config, tensors))
    weights = attention(checkpoint)
    assert weights.lm_head is weights.embed_tokens


def test_heads_that_ranks_do_not_divide_are_refused(deepseek: tuple[Checkpoint, Tensors]) -> None:
    with pytest.raises(ConfigError, match="attention tp=3"):
        attention(deepseek[0], 0, 3)


def test_widths_that_ranks_do_not_divide_are_refused(root: Path) -> None:
    checkpoint, _ = made(root, deepseek_config(intermediate_size=50))
    with pytest.raises(ConfigError, match="attention tensor-parallel ranks=4: must divide 50"):
        attention(checkpoint, 0, 4)


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
        loaded = experts(checkpoint, rank, devices=4, ep=4)
        assert list(loaded) == [1, 2]
        for layer_id, weights in loaded.items():
            w13, w2 = stacked(tensors, layer_id, [2 * rank, 2 * rank + 1])
            assert torch.equal(weights.w13, w13)
            assert torch.equal(weights.w2, w2)
            assert weights.shared is None


def test_redundant_experts_are_loaded_where_the_placement_puts_them(
    deepseek: tuple[Checkpoint, Tensors],
) -> None:
    checkpoint, tensors = deepseek
    parallel = ParallelConfig(expert_devices=2, ep_size=2, num_redundant_experts=4)
    placement = ExpertPlacement.initial(checkpoint.config, parallel)
    for rank in range(2):
        loaded = experts(checkpoint, rank, devices=2, ep=2, redundant=4)
        w13, w2 = stacked(tensors, 1, list(placement.layer(1).logical_experts(rank)))
        assert loaded[1].w13.shape[0] == 6
        assert torch.equal(loaded[1].w13, w13)
        assert torch.equal(loaded[1].w2, w2)


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("etp", [1, 2, 4])
def test_expert_slices_of_all_ranks_are_the_whole(root: Path, is_fused: bool, etp: int) -> None:
    config = deepseek_config()
    tensors = random_tensors(config)
    stored = fused(tensors, ModelConfig.from_hf(config)) if is_fused else tensors
    checkpoint = Checkpoint.open(write_checkpoint(root / f"{is_fused}-{etp}", config, stored))
    parts = [experts(checkpoint, rank, devices=etp, ep=1, shared=True) for rank in range(etp)]
    for layer_id in (1, 2):
        w13, w2 = stacked(tensors, layer_id, list(range(8)))
        held = [part[layer_id] for part in parts]
        gate_up = [weights.w13.view(8, 2, 16 // etp, 32) for weights in held]
        assert torch.equal(torch.cat(gate_up, 2).view(8, 32, 32), w13)
        assert torch.equal(torch.cat([weights.w2 for weights in held], 2), w2)
        shared = [weights.shared for weights in held]
        check_mlp(shared, tensors, f"model.layers.{layer_id}.mlp.shared_experts")


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
    weights, held = attention(checkpoint, dtype=wanted), experts(checkpoint, dtype=wanted)
    assert torch.equal(weights.embed_tokens, tensors["model.embed_tokens.weight"].to(wanted))
    assert torch.equal(held[1].w2, stacked(tensors, 1, list(range(8)))[1].to(wanted))
    router = weights.layers[1].router
    assert router is not None
    assert router.e_score_correction_bias is not None
    exact = torch.float64 if wanted == torch.float64 else torch.float32
    assert router.e_score_correction_bias.dtype == exact
    assert torch.equal(router.e_score_correction_bias, tensors[bias_name].to(exact))


def routed_bytes(tensors: Tensors) -> int:
    return sum(t.nbytes for name, t in tensors.items() if ".experts." in name)


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
        experts(checkpoint, rank, devices=devices, ep=4)
        assert checkpoint.bytes_read * devices == routed_bytes(tensors)


def test_an_attention_process_reads_no_routed_experts(deepseek: tuple[Checkpoint, Tensors]) -> None:
    opened, tensors = deepseek
    checkpoint = Checkpoint.open(opened.directory)
    attention(checkpoint)
    assert checkpoint.bytes_read == sum(t.nbytes for t in tensors.values()) - routed_bytes(tensors)


def test_a_tensor_parallel_rank_reads_only_its_slices(deepseek: tuple[Checkpoint, Tensors]) -> None:
    opened, tensors = deepseek
    checkpoint = Checkpoint.open(opened.directory)
    attention(checkpoint, 1, 2, shared=False)
    expected = 0
    for name, spec in specs(deepseek_config()).items():
        if ".experts." in name or ".shared_experts." in name:
            continue
        if "embed_tokens" in name or "lm_head" in name:
            expected += (61 - 31) * 32 * 4
        else:
            expected += tensors[name].nbytes // (1 if spec.cut_axis is None else 2)
    assert checkpoint.bytes_read == expected


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


def test_loading_tells_how_far_it_is(deepseek: tuple[Checkpoint, Tensors]) -> None:
    steps: list[tuple[int, int]] = []
    load_attention_weights(
        deepseek[0],
        tp_rank=0,
        tp_size=1,
        shared_expert=True,
        dtype=torch.float32,
        device=CPU,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_slices_do_not_keep_the_rest_of_their_tensor_in_memory(
    deepseek: tuple[Checkpoint, Tensors],
) -> None:
    weights = attention(deepseek[0], 1, 4)
    for tensor in (weights.embed_tokens, weights.layers[0].attention.o_proj):
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
