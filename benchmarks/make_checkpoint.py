"""Write the comparison checkpoint: DeepSeek-V3 in shape, random bf16 weights, 1.28 B parameters.

Knows the shape and the tensor names of published DeepSeek-V3 checkpoints; knows nothing of
epserve, so that what serves it is tested against the format and not against itself. Values
are drawn so that activations neither vanish nor overflow; nothing sensible comes out.

    python benchmarks/make_checkpoint.py /tmp/comparison
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shape:
    """Field names are those of config.json."""

    hidden_size: int = 1024
    num_hidden_layers: int = 12
    first_k_dense_replace: int = 1
    intermediate_size: int = 2816
    moe_intermediate_size: int = 512
    n_routed_experts: int = 64
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    n_shared_experts: int = 1
    num_attention_heads: int = 16
    q_lora_rank: int = 512
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    vocab_size: int = 32_000

    def config(self) -> dict[str, object]:
        return {
            **vars(self),
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "num_key_value_heads": self.num_attention_heads,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "tie_word_embeddings": False,
            "attention_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "bfloat16",
        }


def mlp_shapes(prefix: str, hidden: int, intermediate: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (intermediate, hidden),
        f"{prefix}.up_proj.weight": (intermediate, hidden),
        f"{prefix}.down_proj.weight": (hidden, intermediate),
    }


def attention_shapes(shape: Shape, prefix: str) -> Shapes:
    heads, nope, rope = shape.num_attention_heads, shape.qk_nope_head_dim, shape.qk_rope_head_dim
    return {
        f"{prefix}.q_a_proj.weight": (shape.q_lora_rank, shape.hidden_size),
        f"{prefix}.q_a_layernorm.weight": (shape.q_lora_rank,),
        f"{prefix}.q_b_proj.weight": (heads * (nope + rope), shape.q_lora_rank),
        f"{prefix}.kv_a_proj_with_mqa.weight": (shape.kv_lora_rank + rope, shape.hidden_size),
        f"{prefix}.kv_a_layernorm.weight": (shape.kv_lora_rank,),
        f"{prefix}.kv_b_proj.weight": (heads * (nope + shape.v_head_dim), shape.kv_lora_rank),
        f"{prefix}.o_proj.weight": (shape.hidden_size, heads * shape.v_head_dim),
    }


def layer_shapes(shape: Shape, layer_id: int) -> Shapes:
    prefix, hidden = f"model.layers.{layer_id}", shape.hidden_size
    shapes: Shapes = {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
        **attention_shapes(shape, f"{prefix}.self_attn"),
    }
    if layer_id < shape.first_k_dense_replace:
        return shapes | mlp_shapes(f"{prefix}.mlp", hidden, shape.intermediate_size)
    shared = shape.n_shared_experts * shape.moe_intermediate_size
    shapes |= {
        f"{prefix}.mlp.gate.weight": (shape.n_routed_experts, hidden),
        f"{prefix}.mlp.gate.e_score_correction_bias": (shape.n_routed_experts,),
        **mlp_shapes(f"{prefix}.mlp.shared_experts", hidden, shared),
    }
    for expert in range(shape.n_routed_experts):
        name = f"{prefix}.mlp.experts.{expert}"
        shapes |= mlp_shapes(name, hidden, shape.moe_intermediate_size)
    return shapes


def shards(shape: Shape) -> Iterator[Shapes]:
    for layer_id in range(shape.num_hidden_layers):
        yield layer_shapes(shape, layer_id)
    vocabulary = (shape.vocab_size, shape.hidden_size)
    yield {
        "model.embed_tokens.weight": vocabulary,
        "model.norm.weight": (shape.hidden_size,),
        "lm_head.weight": vocabulary,
    }


def draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith("e_score_correction_bias"):
        return torch.randn(shape, generator=generator) * 0.01
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = 1.0 if "embed_tokens" in name else 1.0 / math.sqrt(shape[1])
    return (torch.randn(shape, generator=generator) * scale).to(torch.bfloat16)


def write_checkpoint(directory: Path, shape: Shape, seed: int = 0) -> None:
    """Write config.json, one safetensors file a layer, and their index below `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    files = list(shards(shape))
    for number, shapes in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {name: draw(name, size, generator) for name, size in shapes.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    # Written last: a directory without it is an unfinished one.
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    if (directory / "config.json").exists():
        print(f"{directory} is there already")
        return
    write_checkpoint(directory, Shape())


if __name__ == "__main__":
    main()
