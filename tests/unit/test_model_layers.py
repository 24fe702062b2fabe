"""The decoder's plain pieces: cache sizes, vocabulary cuts, rotation and attention."""

import math

import pytest
import torch

from moe_core.config.model import ModelConfig
from moe_core.model.kv_cache import (
    KvCache,
    LatentKv,
    bytes_per_token,
    gather_blocks,
    gather_valid,
    write_slots,
)
from moe_core.model.layers import embed, rms_norm, vocab_logits, vocab_parts
from moe_core.model.mla import absorbing_is_cheaper
from moe_core.model.paged_attention import decode_attention, prefill_attention
from moe_core.model.rotary import rotation_scale, softmax_scale, yarn_mscale
from moe_core.model.tensor_parallel import NoTensorParallel
from support.decode_loop import ThreadedTensorParallel, run_ranks
from support.published_configs import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    GLM_4_5,
    KIMI_K2,
    MIXTRAL_8X7B,
    QWEN3_30B_A3B,
)


@pytest.mark.parametrize(
    ("published", "enable_mla", "tp_size", "values_per_layer"),
    [
        (DEEPSEEK_V3, True, 1, 576),
        (DEEPSEEK_V3, True, 8, 576),
        (DEEPSEEK_V3, False, 1, 128 * (192 + 128)),
        (DEEPSEEK_V3, False, 4, 32 * (192 + 128)),
        (KIMI_K2, True, 1, 576),
        (DEEPSEEK_V2_LITE, True, 1, 576),
        (DEEPSEEK_V2_LITE, False, 1, 16 * (192 + 128)),
        (QWEN3_30B_A3B, False, 2, 2 * (128 + 128)),
        (QWEN3_30B_A3B, False, 8, 1 * (128 + 128)),
        (GLM_4_5, False, 1, 8 * (128 + 128)),
        (MIXTRAL_8X7B, False, 1, 8 * (128 + 128)),
    ],
)
def test_cache_bytes_per_token_are_the_formulas_as_predicted_and_as_allocated(
    published: dict[str, object], enable_mla: bool, tp_size: int, values_per_layer: int
) -> None:
    config = ModelConfig.from_hf(published)
    expected = values_per_layer * config.num_hidden_layers * 2
    assert bytes_per_token(config, enable_mla, tp_size, torch.bfloat16) == expected
    cache = KvCache.allocate(config, enable_mla, tp_size, 3, 4, torch.bfloat16, "cpu")
    assert cache.nbytes == 3 * 4 * expected
    assert sum(part.untyped_storage().nbytes() for part in cache.parts) == cache.nbytes


@pytest.mark.parametrize(
    ("num_new", "seq_len", "absorbed"),
    [(2, 2, False), (128, 128, False), (512, 100_000, False), (128, 100_000, True), (16, 64, True)],
)
def test_a_prefill_takes_the_form_with_fewer_multiplications(
    num_new: int, seq_len: int, absorbed: bool
) -> None:
    mla = ModelConfig.from_hf(DEEPSEEK_V3).mla
    assert mla is not None
    assert absorbing_is_cheaper(mla, num_new, seq_len) is absorbed


@pytest.mark.parametrize("enable_mla", [True, False])
def test_a_new_cache_holds_zeros(enable_mla: bool) -> None:
    config = ModelConfig.from_hf({**DEEPSEEK_V3, "num_hidden_layers": 4})
    first = KvCache.allocate(config, enable_mla, 8, 3, 4, torch.bfloat16, "cpu").layers[0]
    assert isinstance(first, LatentKv) is enable_mla
    assert not (first.latent if isinstance(first, LatentKv) else first.keys).any()


def test_latent_cache_without_mla_is_refused() -> None:
    with pytest.raises(ValueError, match="enable_mla"):
        bytes_per_token(ModelConfig.from_hf(GLM_4_5), True, 1, torch.bfloat16)


def test_gathered_blocks_hold_what_was_written_in_order() -> None:
    blocks = torch.zeros(4, 2, 1)
    write_slots(blocks, torch.tensor([6, 7, 2]), torch.tensor([[1.0], [2.0], [3.0]]))
    rows = gather_blocks(blocks, torch.tensor([3, 1]))
    assert rows.flatten().tolist() == [1.0, 2.0, 3.0, 0.0]
    both = gather_blocks(blocks, torch.tensor([[3, 1], [1, 0]]))
    assert both.shape == (2, 4, 1)
    assert both[1].flatten().tolist() == [3.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("vocab_size", "tp_size", "parts"),
    [(8, 2, (4, 4)), (7, 2, (4, 3)), (5, 4, (2, 2, 1, 0)), (8, 1, (8,))],
)
def test_vocabulary_parts(vocab_size: int, tp_size: int, parts: tuple[int, ...]) -> None:
    assert vocab_parts(vocab_size, tp_size) == parts


def test_what_others_left_in_a_block_reaches_no_sum() -> None:
    blocks = torch.full((3, 2, 4), float("nan"))
    blocks[2, 0] = 1.0
    mask = torch.tensor([[True, False, False, False]])
    gathered = gather_valid(blocks, torch.tensor([[2, 0]]), mask)
    assert torch.equal(gathered[0, 0], torch.ones(4))
    assert not gathered[0, 1:].any()
    assert blocks.isnan().any(), "the cache itself stays as it is"


@pytest.mark.parametrize("vocab_size", [5, 8])
def test_cut_vocabulary_embeds_and_scores_as_the_whole(vocab_size: int) -> None:
    """With 5 tokens over 4 ranks, the last rank holds none."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab_size, 6, generator=generator)
    hidden = torch.randn(3, 6, generator=generator)
    token_ids = torch.arange(vocab_size)
    part = -(-vocab_size // 4)

    def work(tp: ThreadedTensorParallel) -> tuple[torch.Tensor, torch.Tensor]:
        own = weight[tp.rank * part : (tp.rank + 1) * part]
        return embed(token_ids, own, vocab_size, tp), vocab_logits(hidden, own, vocab_size, tp)

    for embedded, logits in run_ranks(work, 4):
        assert torch.equal(embedded, weight)
        torch.testing.assert_close(logits, hidden @ weight.T)
    alone = NoTensorParallel()
    assert torch.equal(embed(token_ids, weight, vocab_size, alone), weight)


def test_rms_norm_is_computed_in_float32_and_rounded_once_before_the_weight() -> None:
    x = torch.full((1, 4), 300.0, dtype=torch.bfloat16)
    weight = torch.tensor([1.0, 2.0, 0.5, -1.0], dtype=torch.bfloat16)
    assert rms_norm(x, weight, 1e-6).tolist() == [[1.0, 2.0, 0.5, -1.0]]


def test_deepseek_sharpens_attention_by_mscale_squared_and_leaves_the_rotation() -> None:
    config = ModelConfig.from_hf(DEEPSEEK_V3)
    assert rotation_scale(config.rope) == 1.0
    assert softmax_scale(config) == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(192))
    assert yarn_mscale(1.0) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "key_dim", "value_dim"), [(2, 8, 8), (4, 12, 5), (1, 4, 6)])
def test_paged_decode_equals_the_last_row_of_a_prefill(
    dtype: torch.dtype, kv_heads: int, key_dim: int, value_dim: int
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    queries, keys, values = (
        draw(7, 4, key_dim),
        draw(7, kv_heads, key_dim),
        draw(7, kv_heads, value_dim),
    )
    whole = prefill_attention(queries, keys, values, 0.3)
    pieces = torch.cat(
        [
            prefill_attention(queries[:3], keys[:3], values[:3], 0.3),
            prefill_attention(queries[3:], keys, values, 0.3),
        ]
    )
    padded_keys = torch.cat((keys, draw(2, kv_heads, key_dim)))[None]
    padded_values = torch.cat((values, draw(2, kv_heads, value_dim)))[None]
    mask = torch.arange(9)[None] < 7
    one = decode_attention(queries[-1:], padded_keys, padded_values, mask, 0.3)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(pieces, whole, rtol=0, atol=tolerance)
    torch.testing.assert_close(one[0], whole[-1], rtol=0, atol=tolerance)
