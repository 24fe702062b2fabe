"""The decoder computes what transformers does, for every family and branch, in float32.

The reference runs each prompt alone, with its own cache and its own experts; ours runs with
run_experts on the same weights. The installed transformers masks unkept groups with -inf, so it
is a reference for negative biases too; test_every_biased_score_is_negative says why that matters.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from moe_core.checkpoint.attention_loader import load_attention_weights
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.expert_loader import load_expert_weights
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.model import mla
from moe_core.model.decoder import Decoder
from moe_core.model.kv_cache import KvCache
from moe_core.model.tensor_parallel import NoTensorParallel, TensorParallel
from moe_core.model.weights import AttentionTierWeights, ExpertLayerWeights
from moe_core.placement import ExpertPlacement
from support.decode_loop import Generation, Sequences, generate, run_ranks
from support.tiny_cases import CASES
from support.tiny_checkpoints import Checkpoints, Reference

CPU = torch.device("cpu")
LOGIT_TOLERANCE = 1e-4  # float32
MARGIN = 1e-5  # a choice won by less could flip with the order of sums
NUM_TOKENS = 64
WITH_LATENT_CACHE = [name for name, (_, options) in CASES.items() if "kv_lora_rank" in options]


@dataclass(frozen=True)
class Case:
    name: str
    directory: Path
    config: ModelConfig
    references: list[Reference]

    @property
    def cache_kinds(self) -> tuple[bool, ...]:
        return (True, False) if self.config.mla else (False,)

    def run(
        self,
        chosen: list[Reference],
        *,
        enable_mla: bool,
        tp: TensorParallel | None = None,
        prefill_chunk: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Generation:
        tp = tp or NoTensorParallel()
        decoder = Decoder(self.config, self.attention_tier(tp, dtype), enable_mla, tp)
        sequences = Sequences.deal([r.prompt for r in chosen], NUM_TOKENS)
        cache = KvCache.allocate(
            self.config,
            enable_mla,
            tp.size,
            sequences.num_blocks,
            sequences.block_size,
            dtype,
            CPU,
        )
        return generate(decoder, self.all_experts(dtype), cache, sequences, prefill_chunk)

    def attention_tier(
        self, tp: TensorParallel, dtype: torch.dtype = torch.float32
    ) -> AttentionTierWeights:
        return load_attention_weights(
            Checkpoint.open(self.directory),
            tp_rank=tp.rank,
            tp_size=tp.size,
            shared_expert=True,
            dtype=dtype,
            device=CPU,
        )

    def all_experts(self, dtype: torch.dtype) -> dict[int, ExpertLayerWeights]:
        return load_expert_weights(
            Checkpoint.open(self.directory),
            placement=ExpertPlacement.initial(self.config, ParallelConfig()),
            ep_rank=0,
            etp_rank=0,
            etp_size=1,
            shared_expert=False,
            dtype=dtype,
            device=CPU,
        )


def assert_same(result: Generation, chosen: list[Reference]) -> None:
    for logits, tokens, reference in zip(result.first_logits, result.tokens, chosen, strict=True):
        torch.testing.assert_close(logits, reference.logits, rtol=0, atol=LOGIT_TOLERANCE)
        assert tuple(tokens) == reference.tokens


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, checkpoints: Checkpoints) -> Case:
    directory = checkpoints.directory(request.param)
    config = ModelConfig.from_hf(directory)
    return Case(request.param, directory, config, checkpoints.references(request.param))


def test_reference_is_far_from_ties_and_varied(case: Case) -> None:
    assert min(r.router_margin for r in case.references) > MARGIN
    assert min(r.token_margin for r in case.references) > MARGIN
    assert min(len(set(r.tokens)) for r in case.references) >= 8


def test_batch_of_mixed_lengths_equals_transformers(case: Case) -> None:
    for enable_mla in case.cache_kinds:
        result = case.run(case.references, enable_mla=enable_mla)
        assert_same(result, case.references)


def test_prompts_alone_equals_transformers(case: Case) -> None:
    for enable_mla in case.cache_kinds:
        for reference in (case.references[0], case.references[-1]):
            assert_same(case.run([reference], enable_mla=enable_mla), [reference])


def test_prompts_in_pieces_among_decodes_equal_transformers(case: Case) -> None:
    for enable_mla in case.cache_kinds:
        result = case.run(case.references, enable_mla=enable_mla, prefill_chunk=3)
        assert_same(result, case.references)


@pytest.mark.parametrize("case", WITH_LATENT_CACHE, indirect=True)
@pytest.mark.parametrize("absorbed", [True, False])
def test_either_form_of_latent_prefill_equals_transformers(
    case: Case, absorbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mla, "absorbing_is_cheaper", lambda *_: absorbed)
    result = case.run(case.references, enable_mla=True, prefill_chunk=3)
    assert_same(result, case.references)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_tensor_parallel_ranks_all_equal_transformers(case: Case, tp_size: int) -> None:
    """With 2 or 1 KV heads among the cases, this covers replicated KV heads too."""
    for enable_mla in case.cache_kinds if tp_size == 2 else case.cache_kinds[:1]:
        ranks = run_ranks(
            lambda tp, mla=enable_mla: case.run(case.references, enable_mla=mla, tp=tp), tp_size
        )
        assert len(ranks) == tp_size
        for result in ranks:
            assert_same(result, case.references)


def test_float64_caches_agree_beyond_float32(case: Case) -> None:
    results = [
        case.run(case.references, enable_mla=kind, dtype=torch.float64, prefill_chunk=chunk)
        for kind in case.cache_kinds
        for chunk in (None, 3)
    ]
    for result in results:
        assert result.first_logits.dtype == torch.float64
        torch.testing.assert_close(result.first_logits, results[0].first_logits, rtol=0, atol=1e-11)
        assert result.tokens == results[0].tokens


def test_bfloat16_stays_near_float32(case: Case) -> None:
    result = case.run(case.references, enable_mla=case.cache_kinds[0], dtype=torch.bfloat16)
    assert result.first_logits.dtype == torch.float32
    expected = torch.stack([r.logits for r in case.references])
    similarity = torch.cosine_similarity(result.first_logits, expected, dim=-1)
    print(case.name, similarity.tolist())
    assert similarity.min() > 0.9


@pytest.mark.parametrize(
    "case", [name for name in CASES if name.startswith(("deepseek_v3", "glm4_moe"))], indirect=True
)
def test_every_biased_score_is_negative(case: Case) -> None:
    """A sigmoid is below 1, so a group mask of 0 would beat every kept expert."""
    for layer in case.attention_tier(NoTensorParallel()).layers:
        if layer.router is not None:
            bias = layer.router.e_score_correction_bias
            assert bias is not None
            assert bias.min() >= -4
            assert bias.max() <= -1.5
