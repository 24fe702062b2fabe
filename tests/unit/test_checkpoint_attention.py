"""What attention ranks load: their slices, together the whole, and no bytes besides."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_core.checkpoint.attention_loader import load_attention_weights
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.errors import ConfigError
from moe_core.model.weights import (
    AttentionTierWeights,
    GqaWeights,
    LayerWeights,
    MlaWeights,
)
from support.checkpoint_files import (
    CPU,
    Tensors,
    check_gated_mlp,
    deepseek_config,
    load_attention,
    made,
    qwen_config,
    random_tensors,
    routed_bytes,
    specs,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def deepseek(root: Path) -> tuple[Checkpoint, Tensors]:
    return made(root, deepseek_config())


def joined(parts: list[Tensor | None], dim: int) -> Tensor:
    return torch.cat([part for part in parts if part is not None], dim)


def layer_parts(parts: list[AttentionTierWeights], layer_id: int) -> list[LayerWeights]:
    return [part.layers[layer_id] for part in parts]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_mla_slices_of_all_ranks_are_the_whole(
    deepseek: tuple[Checkpoint, Tensors], tp: int
) -> None:
    checkpoint, tensors = deepseek
    parts = [load_attention(checkpoint, rank, tp) for rank in range(tp)]
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
    parts = [load_attention(checkpoint, rank, tp) for rank in range(tp)]
    check_gated_mlp([p.mlp for p in layer_parts(parts, 0)], tensors, "model.layers.0.mlp")
    shared = [p.shared_expert for p in layer_parts(parts, 1)]
    check_gated_mlp(shared, tensors, "model.layers.1.mlp.shared_experts")


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_vocabulary_is_cut_into_equal_parts_with_a_shorter_last(
    deepseek: tuple[Checkpoint, Tensors], tp: int
) -> None:
    checkpoint, tensors = deepseek
    parts = [load_attention(checkpoint, rank, tp) for rank in range(tp)]
    assert {p.embed_tokens.shape[0] for p in parts[:-1]} <= {-(-61 // tp)}
    assert torch.equal(
        joined([p.embed_tokens for p in parts], 0), tensors["model.embed_tokens.weight"]
    )
    assert torch.equal(joined([p.lm_head for p in parts], 0), tensors["lm_head.weight"])


def test_a_vocabulary_smaller_than_its_parts_leaves_the_last_rank_none(root: Path) -> None:
    checkpoint, tensors = made(root, deepseek_config(vocab_size=9))
    parts = [load_attention(checkpoint, rank, 4) for rank in range(4)]
    assert [part.embed_tokens.shape[0] for part in parts] == [3, 3, 3, 0]
    assert torch.equal(joined([p.lm_head for p in parts], 0), tensors["lm_head.weight"])


@pytest.mark.parametrize(
    ("tp", "kv_heads"), [(1, [[0, 1]]), (2, [[0], [1]]), (4, [[0], [0], [1], [1]])]
)
def test_kv_heads_are_cut_or_replicated(root: Path, tp: int, kv_heads: list[list[int]]) -> None:
    checkpoint, tensors = made(root, qwen_config(attention_bias=True))
    parts = [load_attention(checkpoint, rank, tp) for rank in range(tp)]
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
            weights = load_attention(checkpoint, rank, 2).layers[0].attention
            name = "o_proj_bias" if isinstance(weights, MlaWeights) else "o_bias"
            biases.append(getattr(weights, name))
        assert biases[0] is not None
        assert biases[1] is None


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_is_the_embedding_itself(root: Path, stored: bool) -> None:
    config = deepseek_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    if not stored:
        del tensors["lm_head.weight"]
    checkpoint = Checkpoint.open(write_checkpoint(root / f"tied-{stored}", config, tensors))
    weights = load_attention(checkpoint)
    assert weights.lm_head is weights.embed_tokens


def test_heads_that_ranks_do_not_divide_are_refused(deepseek: tuple[Checkpoint, Tensors]) -> None:
    with pytest.raises(ConfigError, match="attention tp=3"):
        load_attention(deepseek[0], 0, 3)


def test_widths_that_ranks_do_not_divide_are_refused(root: Path) -> None:
    checkpoint, _ = made(root, deepseek_config(intermediate_size=50))
    with pytest.raises(ConfigError, match="attention tensor-parallel ranks=4: must divide 50"):
        load_attention(checkpoint, 0, 4)


def test_an_attention_process_reads_no_routed_experts(deepseek: tuple[Checkpoint, Tensors]) -> None:
    opened, tensors = deepseek
    checkpoint = Checkpoint.open(opened.directory)
    load_attention(checkpoint)
    assert checkpoint.bytes_read == sum(t.nbytes for t in tensors.values()) - routed_bytes(tensors)


def test_a_tensor_parallel_rank_reads_only_its_slices(deepseek: tuple[Checkpoint, Tensors]) -> None:
    opened, tensors = deepseek
    checkpoint = Checkpoint.open(opened.directory)
    load_attention(checkpoint, 1, 2, shared=False)
    expected = 0
    for name, spec in specs(deepseek_config()).items():
        if ".experts." in name or ".shared_experts." in name:
            continue
        if "embed_tokens" in name or "lm_head" in name:
            expected += (61 - 31) * 32 * 4
        else:
            expected += tensors[name].nbytes // (1 if spec.cut_axis is None else 2)
    assert checkpoint.bytes_read == expected


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
    weights = load_attention(deepseek[0], 1, 4)
    for tensor in (weights.embed_tokens, weights.layers[0].attention.o_proj):
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
