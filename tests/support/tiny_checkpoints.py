"""Tiny random checkpoints of every family and branch, as transformers saves them, and what
transformers computes with them.

Knows transformers; nothing of how epserve loads or runs a model. A checkpoint is made once
under a directory that the caller names and is found there afterwards.

Weights are drawn so that outputs depend on everything: norms and biases are random too, logits
spread over several units, and every `e_score_correction_bias` is in [-4, -1.5], where a group
mask of 0 instead of -inf would choose the wrong experts. The seeds are such that neither a
router choice nor a greedy token of the reference runs is near a tie: Reference says how near.
The installed transformers masks groups with -inf; releases that masked with 0 are no reference
for these checkpoints.
"""

import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_core.config.model import ModelConfig, MoeConfig
from support.plain_router import plain_route

if TYPE_CHECKING:
    import transformers

Options = Mapping[str, object]

_BASE: Options = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-2,  # far from the 1e-6 that MLA's inner norms have
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_MLA: Options = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_DEEPSEEK: Options = {
    **_BASE,
    **_MLA,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
}
_V3: Options = {**_DEEPSEEK, "num_mtp_layers": 0}
_GQA: Options = {**_BASE, "num_key_value_heads": 2, "moe_intermediate_size": 32}
_GLM: Options = {
    **_GQA,
    "head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.5,
    "num_mtp_layers": 0,
}
_QWEN: Options = {**_GQA, "head_dim": 24, "num_experts": 8, "num_experts_per_tok": 2}


def _yarn(**more: object) -> Options:
    return {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        **more,
    }


# name: (transformers' config class, its options)
CASES: Mapping[str, tuple[str, Options]] = {
    "deepseek_v3": ("DeepseekV3Config", _V3),
    "deepseek_v3-yarn-qlora": (
        "DeepseekV3Config",
        {
            **_V3,
            "rope_parameters": _yarn(mscale=1.0, mscale_all_dim=0.7, beta_fast=1.0, beta_slow=0.02),
        },
    ),
    "deepseek_v3-noqlora-ungrouped-raw-shared0": (
        "DeepseekV3Config",
        {
            **_V3,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 0,
            "norm_topk_prob": False,
            "rope_parameters": _yarn(beta_fast=1.0, beta_slow=1.0),
            "vocab_size": 127,
        },
    ),
    "deepseek_v3-halfrope-bias-tied-shared2": (
        "DeepseekV3Config",
        {
            **_V3,
            "rope_interleave": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
        },
    ),
    "deepseek_v2-greedy-noqlora": (
        "DeepseekV2Config",
        {**_DEEPSEEK, "q_lora_rank": None, "n_group": None, "topk_group": None},
    ),
    "deepseek_v2-grouped-yarn-qlora-shared2": (
        "DeepseekV2Config",
        {
            **_DEEPSEEK,
            "topk_method": "group_limited_greedy",
            "n_shared_experts": 2,
            "routed_scaling_factor": 4.0,
            "rope_parameters": _yarn(mscale=0.7, mscale_all_dim=0.7),
        },
    ),
    "qwen3_moe-norm": ("Qwen3MoeConfig", {**_QWEN, "norm_topk_prob": True}),
    "qwen3_moe-raw-bias-tied-sparse2": (
        "Qwen3MoeConfig",
        {
            **_QWEN,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe-yarn-kv1-mlponly": (
        "Qwen3MoeConfig",
        {
            **_QWEN,
            "norm_topk_prob": True,
            "num_key_value_heads": 1,
            "mlp_only_layers": [1],
            "rope_parameters": _yarn(attention_factor=1.2, truncate=False),
        },
    ),
    "glm4_moe-qknorm-bias": (
        "Glm4MoeConfig",
        {**_GLM, "use_qk_norm": True, "attention_bias": True},
    ),
    "glm4_moe-grouped-shared2": (
        "Glm4MoeConfig",
        {**_GLM, "n_group": 4, "topk_group": 2, "n_shared_experts": 2},
    ),
    "mixtral": (
        "MixtralConfig",
        {**_BASE, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
}

# Where seed 0 draws a near tie.
SEEDS: Mapping[str, int] = {"deepseek_v2-grouped-yarn-qlora-shared2": 17, "mixtral": 1}


def tiny_checkpoint(name: str, root: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The checkpoint `name` of CASES in a directory below `root`, made if it is not there."""
    directory = root / f"{name}-{str(dtype).removeprefix('torch.')}"
    if directory.exists():
        return directory
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        made = Path(scratch) / "made"
        _random_model(name).to(dtype).save_pretrained(made)
        # Several test processes may make it at once: the first rename wins, all are the same.
        try:
            made.rename(directory)
        except OSError:
            if not directory.exists():
                raise
    return directory


def _random_model(name: str) -> "transformers.PreTrainedModel":
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config_class, options = CASES[name]
    config = getattr(transformers, config_class)(**options)
    with torch.random.fork_rng(), warnings.catch_warnings():
        # Without shared experts transformers builds an MLP of width 0.
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(SEEDS.get(name, 0))
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.copy_(_draw(key, tensor.shape, generator))
    return model


def _draw(key: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if key.endswith("e_score_correction_bias"):
        return torch.rand(shape, generator=generator) * 2.5 - 4.0
    noise = torch.randn(shape, generator=generator)
    if "norm" in key:
        return 1 + 0.2 * noise
    if key.endswith("bias"):
        return 0.2 * noise
    if "embed_tokens" in key:
        return noise
    return noise * 2 / math.sqrt(shape[-1])


@dataclass(frozen=True, slots=True)
class Reference:
    """What transformers computes for one prompt, in float32, with its own cache.

    logits: of the last prompt token, [vocab]. tokens: greedy continuation. token_margin: by how
    much the closest greedy choice was won; router_margin: the same for the routers.
    """

    prompt: tuple[int, ...]
    logits: Tensor
    tokens: tuple[int, ...]
    token_margin: float
    router_margin: float


def prompts(vocab_size: int, lengths: Sequence[int] = (1, 5, 17, 40)) -> list[tuple[int, ...]]:
    """Fixed prompts of mixed lengths."""
    generator = torch.Generator().manual_seed(7)
    draw = (torch.randint(2, vocab_size, (n,), generator=generator).tolist() for n in lengths)
    return [tuple(tokens) for tokens in draw]


def references(
    directory: Path, all_prompts: Sequence[tuple[int, ...]], num_tokens: int = 64
) -> list[Reference]:
    """Runs transformers on a checkpoint, in float32, each prompt alone."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.eval()
    config = ModelConfig.from_hf(directory)
    margins: list[float] = []
    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(
                lambda gate, _inputs, output: margins.append(
                    _router_margin(gate, output[0], config.moe)
                )
            )
    return [_reference(model, prompt, num_tokens, margins) for prompt in all_prompts]


@torch.no_grad()
def _reference(
    model: torch.nn.Module, prompt: tuple[int, ...], num_tokens: int, margins: list[float]
) -> Reference:
    margins.clear()
    tokens: list[int] = []
    token_margins: list[float] = []
    out = model(torch.tensor([prompt]), use_cache=True)
    first = out.logits[0, -1]
    for _ in range(num_tokens):
        best = out.logits[0, -1].topk(2)
        token_margins.append((best.values[0] - best.values[1]).item())
        tokens.append(int(best.indices[0]))
        out = model(
            torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True
        )
    return Reference(prompt, first, tuple(tokens), min(token_margins), min(margins))


def _router_margin(gate: torch.nn.Module, logits: Tensor, moe: MoeConfig) -> float:
    bias = getattr(gate, "e_score_correction_bias", None)
    plain_bias = None if bias is None else bias.double().tolist()
    rows = logits.double().view(-1, moe.num_experts).tolist()
    return min(plain_route(row, plain_bias, moe).margin for row in rows)


@dataclass
class Checkpoints:
    """The tiny checkpoints below `root`, in float32, and what transformers computes for the
    fixed prompts."""

    root: Path
    _references: dict[str, list[Reference]] = field(default_factory=dict)

    def directory(self, name: str) -> Path:
        return tiny_checkpoint(name, self.root)

    def references(self, name: str) -> list[Reference]:
        if name not in self._references:
            directory = self.directory(name)
            vocab_size = ModelConfig.from_hf(directory).vocab_size
            self._references[name] = references(directory, prompts(vocab_size))
        return self._references[name]
