"""Tiny random checkpoints of every family and branch, as transformers saves them, and what
transformers computes with them.

Knows transformers; nothing of how epserve loads or runs a model. A checkpoint is made once
under a directory that the caller names and is found there afterwards.

Weights are drawn so that outputs depend on everything: norms and biases are random too, logits
spread over several units, and every `e_score_correction_bias` is in [-4, -1.5], where a group
mask of 0 instead of -inf would choose the wrong experts. The seeds are such that neither a
router choice nor a greedy token of the reference runs is near a tie: Reference says how near.
The installed transformers masks groups with -inf; releases that masked with 0 (before its fix
#45441) are no reference for these checkpoints. tests/unit/test_router.py compares to the formula.
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
from support.tiny_cases import CASES

if TYPE_CHECKING:
    import transformers

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

    logits: of the last prompt token, [vocab]; prompt_logprobs: log_softmax at the others, [p - 1,
    vocab]. tokens: greedy continuation. token_margin: by how much the closest greedy choice was
    won; router_margin: the same for the routers.
    """

    prompt: tuple[int, ...]
    logits: Tensor
    prompt_logprobs: Tensor
    tokens: tuple[int, ...]
    token_margin: float
    router_margin: float

    @property
    def told(self) -> list[float]:
        """The logprobs of the prompt's own tokens, the first excepted."""
        following = torch.tensor(self.prompt[1:], dtype=torch.int64)
        return self.prompt_logprobs.gather(1, following[:, None])[:, 0].tolist()


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
    prompt_logprobs = out.logits[0, :-1].log_softmax(-1)
    for _ in range(num_tokens):
        best = out.logits[0, -1].topk(2)
        token_margins.append((best.values[0] - best.values[1]).item())
        tokens.append(int(best.indices[0]))
        out = model(
            torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True
        )
    return Reference(
        prompt, first, prompt_logprobs, tuple(tokens), min(token_margins), min(margins)
    )


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
