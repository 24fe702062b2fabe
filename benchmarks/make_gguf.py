"""The comparison checkpoint as llama.cpp reads it: GGUF, bf16 matrices.

    python benchmarks/make_gguf.py /tmp/comparison /tmp/comparison.gguf

Needs the package `gguf`. Knows the names that llama.cpp gives a DeepSeek model's tensors, and only
the shape that make_checkpoint.py writes. The file has no vocabulary: token ids go in and come out.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open

ARCHITECTURE = "deepseek2"  # of DeepSeek-V3 as well
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
IN_FLOAT32 = re.compile(r"norm|gate_inp|exp_probs_b")
NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")

Named = Iterator[tuple[str, torch.Tensor]]


def converted(file: Any, config: dict[str, Any]) -> Named:  # noqa: ANN401
    """llama.cpp's names and tensors of one of the checkpoint's files, which holds whole layers."""
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name in file.keys():  # noqa: SIM118 (no mapping)
        tensor = file.get_tensor(name)
        if name in TOP:
            yield TOP[name], tensor
            continue
        found = NAME.fullmatch(name)
        assert found is not None, name
        layer, rest = f"blk.{found[1]}", found[2]
        expert = EXPERT.fullmatch(rest)
        if expert is not None:
            key = f"{layer}.ffn_{expert[2]}_exps.weight"
            experts.setdefault(key, {})[int(expert[1])] = tensor
        elif rest == "self_attn.kv_b_proj.weight":
            yield from _halves(layer, tensor, config)
        else:
            yield f"{layer}.{LAYER[rest]}", tensor
    for key, parts in experts.items():
        yield key, torch.stack([parts[number] for number in sorted(parts)])


def _halves(layer: str, kv_b: torch.Tensor, config: dict[str, Any]) -> Named:
    """Absorbed attention wants the keys' part transposed."""
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    per_head = kv_b.view(heads, nope + config["v_head_dim"], config["kv_lora_rank"])
    yield f"{layer}.attn_k_b.weight", per_head[:, :nope].transpose(1, 2).contiguous()
    yield f"{layer}.attn_v_b.weight", per_head[:, nope:].contiguous()


def describe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rope, lora = config["qk_rope_head_dim"], config["kv_lora_rank"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)  # absorbed: all heads share the latent
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(rope)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(lora)
    writer.add_key_length(lora + rope)
    writer.add_value_length(lora)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")


def write(directory: Path, target: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(target, ARCHITECTURE)
    describe(writer, config)
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name, tensor in converted(file, config):
                if IN_FLOAT32.search(name):
                    writer.add_tensor(name, tensor.float().numpy())
                    continue
                raw = tensor.view(torch.uint8).numpy()  # rows of bytes, as gguf takes bf16
                writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    write(options.directory, options.target)


if __name__ == "__main__":
    main()
