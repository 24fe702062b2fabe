"""How the bundled tiny model is shaped and trained.

Knows the architecture (`deepseek_v3` made small), the byte-level tokenizer, the optimiser and
DeepSeek-V3's balancing of experts without an auxiliary loss: after each step the selection
bias of an expert that got fewer tokens than the mean rises, the others' falls. Knows nothing
of where the text comes from nor of how the result is published. Needs transformers, which
epserve itself does not.
"""

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

SEPARATOR = "<|endoftext|>"
SEPARATOR_ID = 0


@dataclass(frozen=True)
class ModelShape:
    """Sizes, under their `config.json` names. Every one that is sharded divides by 4."""

    vocab_size: int = 2048
    hidden_size: int = 160
    intermediate_size: int = 480
    moe_intermediate_size: int = 64
    num_hidden_layers: int = 4
    first_k_dense_replace: int = 1
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    q_lora_rank: int = 96
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    n_group: int = 4
    topk_group: int = 2
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    max_position_embeddings: int = 1024


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that decides the weights, apart from the text and the machine's arithmetic."""

    shape: ModelShape = field(default_factory=ModelShape)
    steps: int = 4500
    seed: int = 0
    tokens_per_step: int = 1024
    sequence_lengths: tuple[int, ...] = (*(256,) * 7, 1024)
    peak_learning_rate: float = 3e-3
    final_fraction: float = 0.05
    warmup_steps: int = 200
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    bias_update_rate: float = 2e-3

    def schedule(self, step: int) -> float:
        """Linear warm-up, then a cosine down to `final_fraction`; 1 is the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.final_fraction + (1 - self.final_fraction) * (1 + math.cos(math.pi * done)) / 2


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any UTF-8 text encodes, and decodes to the same bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """All texts as one row of ids, a separator before each and after the last."""
    ids = [SEPARATOR_ID]
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        ids += [*encoding.ids, SEPARATOR_ID]
    return torch.tensor(ids)


def build_model(plan: TrainingPlan) -> DeepseekV3ForCausalLM:
    """The untrained model in float32, its weights decided by the seed."""
    torch.manual_seed(plan.seed)
    published_names = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    config = DeepseekV3Config(
        **vars(plan.shape),
        **cast("Any", published_names),
        bos_token_id=None,
        eos_token_id=SEPARATOR_ID,
        num_mtp_layers=0,
    )
    config._experts_implementation = "grouped_mm"
    return DeepseekV3ForCausalLM(config)


def batch_at(plan: TrainingPlan, stream: torch.Tensor, step: int) -> torch.Tensor:
    """The windows of one step, `[rows, length + 1]`: a function of seed and step alone."""
    length = plan.sequence_lengths[step % len(plan.sequence_lengths)]
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
    rows = plan.tokens_per_step // length
    starts = torch.randint(len(stream) - length, (rows, 1), generator=generator)
    return stream[starts + torch.arange(length + 1)]


class ExpertBalancer:
    """Counts the tokens of each expert of each layer, and moves the selection biases."""

    def __init__(self, model: nn.Module) -> None:
        self.routers = [m for m in model.modules() if isinstance(m, DeepseekV3TopkRouter)]
        self.loads = [torch.zeros(router.num_experts) for router in self.routers]
        for layer, router in enumerate(self.routers):
            router.register_forward_hook(partial(self._count, layer))

    def _count(
        self, layer: int, router: nn.Module, args: object, output: tuple[torch.Tensor, ...]
    ) -> None:
        """A forward hook: the router returns logits, weights and the chosen experts."""
        load = self.loads[layer]
        load.copy_(torch.bincount(output[2].flatten(), minlength=len(load)))

    def update(self, rate: float) -> None:
        """Move every bias by `rate` towards an even load."""
        for load, router in zip(self.loads, self.routers, strict=True):
            cast("torch.Tensor", router.e_score_correction_bias).add_(
                torch.sign(load.mean() - load), alpha=rate
            )

    def imbalance(self) -> float:
        """Busiest expert's load over the mean, of the worst layer in the last step."""
        return max(float(load.max() / load.mean()) for load in self.loads)


@dataclass
class Trainer:
    """A training run that can be stopped and taken up again from `checkpoint`."""

    plan: TrainingPlan
    stream: torch.Tensor
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        self.model = build_model(self.plan)
        self.balancer = ExpertBalancer(self.model)
        parameters = list(self.model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.95), weight_decay=self.plan.weight_decay
        )
        self.step, self.seconds = 0, 0.0
        if self.checkpoint is not None and self.checkpoint.exists():
            self._load(self.checkpoint)

    def run(self, report_every: int = 50, save_every: int = 100) -> DeepseekV3ForCausalLM:
        """Train up to the plan's last step."""
        self.model.train()
        while self.step < self.plan.steps:
            began = time.monotonic()
            loss = self.take_step()
            self.seconds += time.monotonic() - began
            if self.step % report_every == 0 or self.step == self.plan.steps:
                step, balance = self.step, self.balancer.imbalance()
                speed = step * self.plan.tokens_per_step / self.seconds
                print(f"{step=} {loss=:.3f} {balance=:.2f} {speed=:.0f}", flush=True)
            if self.checkpoint is not None and self.step % save_every == 0:
                self._save(self.checkpoint)
        self.model.eval()
        return self.model

    def take_step(self) -> float:
        """One optimiser step; returns the batch's loss before it."""
        factor = self.plan.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.peak_learning_rate * factor
        batch = batch_at(self.plan, self.stream, self.step)
        logits = self.model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip_norm)
        self.optimizer.step()
        self.balancer.update(self.plan.bias_update_rate * factor)
        self.step += 1
        return loss.item()

    def _save(self, path: Path) -> None:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        unfinished = path.with_suffix(".unfinished")
        save_file(tensors, unfinished, {"step": str(self.step), "seconds": repr(self.seconds)})
        unfinished.replace(path)

    def _load(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            told = file.metadata()
        self.step, self.seconds = int(told["step"]), float(told["seconds"])
        model, moments = {}, defaultdict[int, dict[str, torch.Tensor]](dict)
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "model":
                model[rest] = value
            else:
                index, _, moment = rest.partition(".")
                moments[int(index)][moment] = value
        self.model.load_state_dict(model)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
