"""Small checkpoint directories made by hand, to be read, cut and damaged.

Knows config.json, safetensors files and their index; shapes come from the loader's own table,
which the tests against transformers hold to account.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_core.checkpoint.attention_loader import load_attention_weights
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.checkpoint.expected import TensorSpec, expected_tensors
from moe_core.checkpoint.expert_loader import load_expert_weights
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.model.weights import AttentionTierWeights, ExpertLayerWeights, MlpWeights
from moe_core.placement import ExpertPlacement

Json = dict[str, object]
Tensors = dict[str, Tensor]
INDEX = "model.safetensors.index.json"
CPU = torch.device("cpu")


def deepseek_config(**changes: object) -> Json:
    """A deepseek_v3 model of three layers, the first dense, with 8 experts."""
    config: Json = {
        "model_type": "deepseek_v3",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 12,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        "eos_token_id": 1,
    }
    return config | changes


def qwen_config(**changes: object) -> Json:
    """A qwen3_moe model of two layers with 4 experts, 4 query heads and 2 KV heads."""
    config: Json = {
        "model_type": "qwen3_moe",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        "eos_token_id": 1,
    }
    return config | changes


def specs(config: Json) -> dict[str, TensorSpec]:
    return expected_tensors(ModelConfig.from_hf(config), ())


def random_tensors(config: Json, dtype: torch.dtype = torch.float32) -> Tensors:
    """Every tensor that the config asks for, named expert by expert."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: spec.shape for name, spec in specs(config).items()}
    return {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in shapes.items()}


def write_checkpoint(
    directory: Path, config: Json, tensors: Mapping[str, Tensor], num_files: int = 1
) -> Path:
    """One model.safetensors, or `num_files` files of every n-th tensor and an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if num_files == 1:
        save_file(dict(tensors), directory / "model.safetensors")
        return directory
    weight_map: dict[str, str] = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        names = sorted(tensors)[number::num_files]
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def made(root: Path, config: Json) -> tuple[Checkpoint, Tensors]:
    """A new sharded checkpoint below `root`, opened, and what was written into it."""
    tensors = random_tensors(config)
    directory = root / f"made-{len(list(root.iterdir()))}"
    return Checkpoint.open(write_checkpoint(directory, config, tensors, num_files=2)), tensors


def edit_tensors(directory: Path, edit: Callable[[Tensors], object]) -> None:
    """Rewrite model.safetensors with what `edit` makes of its tensors."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_weight_map(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the index with what `edit` makes of its weight_map."""
    index = json.loads((directory / INDEX).read_text())
    edit(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def fused(tensors: Tensors, config: ModelConfig) -> Tensors:
    """The same tensors with each layer's experts in two, as transformers 5 holds them."""
    result = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer_id in config.moe_layer_ids:
        stem = f"model.layers.{layer_id}.mlp.experts"
        gate_up, down = [], []
        for expert in range(config.moe.num_experts):
            gate = tensors[f"{stem}.{expert}.gate_proj.weight"]
            up = tensors[f"{stem}.{expert}.up_proj.weight"]
            gate_up.append(torch.cat([gate, up]))
            down.append(tensors[f"{stem}.{expert}.down_proj.weight"])
        result[f"{stem}.gate_up_proj"] = torch.stack(gate_up)
        result[f"{stem}.down_proj"] = torch.stack(down)
    return result


def check_gated_mlp(parts: list[MlpWeights | None], tensors: Tensors, stem: str) -> None:
    """The ranks' slices of a gated MLP are the stored tensors below `stem`."""
    for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        whole = torch.cat([getattr(part, name) for part in parts], dim)
        assert torch.equal(whole, tensors[f"{stem}.{name}.weight"])


def routed_bytes(tensors: Tensors) -> int:
    """Of all routed experts together."""
    return sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)


def load_attention(
    checkpoint: Checkpoint,
    rank: int = 0,
    size: int = 1,
    *,
    shared: bool = True,
    dtype: torch.dtype = torch.float32,
) -> AttentionTierWeights:
    """What attention TP rank `rank` of `size` holds."""
    return load_attention_weights(
        checkpoint, tp_rank=rank, tp_size=size, shared_expert=shared, dtype=dtype, device=CPU
    )


def load_experts(
    checkpoint: Checkpoint,
    rank: int = 0,
    *,
    ep: int = 1,
    etp: int = 1,
    redundant: int = 0,
    shared: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[int, ExpertLayerWeights]:
    """What process `rank` of an expert tier of ep · etp holds under the first placement."""
    parallel = ParallelConfig(
        expert_devices=ep * etp, ep_size=ep, num_redundant_experts=redundant
    ).with_model(checkpoint.config)
    ep_rank, etp_rank = parallel.expert_ranks(rank)
    return load_expert_weights(
        checkpoint,
        placement=ExpertPlacement.initial(checkpoint.config, parallel),
        ep_rank=ep_rank,
        etp_rank=etp_rank,
        etp_size=etp,
        shared_expert=shared,
        dtype=dtype,
        device=CPU,
    )
