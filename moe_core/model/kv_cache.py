"""The paged KV cache of one attention process.

Knows its layout, its size per token, and how to write and gather by block. Knows no sequences:
who owns which block is the caller's.

Masked positions contribute exactly nothing: what a padded block table gathers is zeroed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_core.config.model import ModelConfig


@dataclass(frozen=True, slots=True)
class LatentKv:
    """MLA, compressed: the normalised latent, then the rotated shared key."""

    latent: Tensor  # [num_blocks, block_size, kv_lora_rank + qk_rope_head_dim]


@dataclass(frozen=True, slots=True)
class PerHeadKv:
    keys: Tensor  # [num_blocks, block_size, kv_heads/tp, head_dim]
    values: Tensor  # [num_blocks, block_size, kv_heads/tp, v_head_dim]


def write_slots(blocks: Tensor, slot_mapping: Tensor, new: Tensor) -> None:
    """Put row i of `new` [n, …] into slot slot_mapping[i] of `blocks`."""
    blocks.flatten(0, 1).index_copy_(0, slot_mapping, new)


def gather_valid(blocks: Tensor, block_tables: Tensor, mask: Tensor) -> Tensor:
    """`gather_blocks` for [b, blocks], with zeros where mask [b, blocks · block_size] is False:
    what others have left there might not be finite, and 0 · NaN is NaN."""
    rows = gather_blocks(blocks, block_tables)  # [b, blocks · block_size, …]
    hidden = ~mask.view(*mask.shape, *[1] * (rows.dim() - 2))
    return rows.masked_fill_(hidden, 0)


def gather_blocks(blocks: Tensor, block_table: Tensor) -> Tensor:
    """Rows of the named blocks, in order: [*batch, blocks · block_size, …] for [*batch, blocks]."""
    return blocks[block_table].flatten(block_table.dim() - 1, block_table.dim())


@dataclass(frozen=True, slots=True)
class KvCache:
    """layers[i] is LatentKv with enable_mla, else PerHeadKv, for every layer i."""

    layers: tuple[LatentKv | PerHeadKv, ...]
    num_blocks: int
    block_size: int

    @staticmethod
    def allocate(
        config: ModelConfig,
        enable_mla: bool,
        tp_size: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "KvCache":
        def one() -> LatentKv | PerHeadKv:
            parts = [
                torch.zeros(num_blocks, block_size, *shape, dtype=dtype, device=device)
                for shape in _shapes_per_token(config, enable_mla, tp_size)
            ]
            return LatentKv(parts[0]) if enable_mla else PerHeadKv(parts[0], parts[1])

        layers = tuple(one() for _ in range(config.num_hidden_layers))
        return KvCache(layers=layers, num_blocks=num_blocks, block_size=block_size)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Every layer's tensors, [num_blocks, block_size, …] each."""
        return tuple(
            part
            for layer in self.layers
            for part in (
                (layer.latent,) if isinstance(layer, LatentKv) else (layer.keys, layer.values)
            )
        )

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def bytes_per_token(config: ModelConfig, enable_mla: bool, tp_size: int, dtype: torch.dtype) -> int:
    """Cache bytes of one token over all layers, on one attention process."""
    shapes = _shapes_per_token(config, enable_mla, tp_size)
    values = sum(shape.numel() for shape in shapes)
    return values * config.num_hidden_layers * dtype.itemsize


def _shapes_per_token(
    config: ModelConfig, enable_mla: bool, tp_size: int
) -> tuple[torch.Size, ...]:
    if enable_mla:
        if config.mla is None:
            raise ValueError(f"{config.model_type} has no latent cache: enable_mla needs MLA")
        return (torch.Size((config.mla.latent_dim,)),)
    heads = config.local_kv_heads(tp_size)
    return torch.Size((heads, config.head_dim)), torch.Size((heads, config.v_head_dim))
