"""Causal attention of one step's rows over a paged cache.

Knows rows, heads and blocks. Knows no projections and no families.

Sequences with one new token are computed together, padded to the longest; a sequence with
several is computed alone. Scores are exact either way: nothing but the order of sums differs.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moe_core.model.batch import AttentionBatch, PrefillRows
from moe_core.model.kv_cache import PerHeadKv, gather_blocks, gather_valid, write_slots
from moe_core.model.layers import precise_dtype
from moe_core.model.linear import activation_dtype


def decode_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """One query per sequence.

    queries [b, heads, d], keys [b, t, kv_heads, d], values [b, t, kv_heads, v], mask [b, t]
    True where a token is. Returns [b, heads, v].
    """
    dtype = queries.dtype
    wide = activation_dtype(dtype, queries.device)
    queries, keys, values = queries.to(wide), keys.to(wide), values.to(wide)
    grouped = queries.view(queries.shape[0], keys.shape[2], -1, queries.shape[2])
    products = grouped @ keys.permute(0, 2, 3, 1)  # [b, kv_heads, group, t]
    scores = products.to(precise_dtype(queries.dtype)) * scale
    scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    weights = scores.softmax(dim=-1).to(queries.dtype)
    mixed: Tensor = weights @ values.transpose(1, 2)  # [b, kv_heads, group, v]
    return mixed.flatten(1, 2).to(dtype)


def prefill_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The last s tokens of one sequence of t.

    queries [s, heads, d], keys [t, kv_heads, d], values [t, kv_heads, v]. Returns
    [s, heads, v].
    """
    dtype = queries.dtype
    wide = activation_dtype(dtype, queries.device)
    queries, keys, values = queries.to(wide), keys.to(wide), values.to(wide)
    num_new, num_heads, key_dim = queries.shape
    total, kv_heads, value_dim = values.shape
    group = num_heads // kv_heads
    # The fused kernels want values as wide as keys; zeros change nothing.
    if value_dim < key_dim:
        values = functional.pad(values, (0, key_dim - value_dim))
    mask = None
    if num_new < total:
        rows = torch.arange(total - num_new, total, device=queries.device)
        mask = torch.arange(total, device=queries.device) <= rows[:, None]  # [s, t]
    out = functional.scaled_dot_product_attention(
        queries.view(num_new, kv_heads, group, key_dim).permute(
            1, 2, 0, 3
        ),  # [kv_heads, group, s, d]
        keys.transpose(0, 1)[:, None].expand(-1, group, -1, -1),  # [kv_heads, group, t, d]
        values.transpose(0, 1)[:, None].expand(-1, group, -1, -1),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )  # [kv_heads, group, s, d]
    return out[..., :value_dim].permute(2, 0, 1, 3).flatten(1, 2).to(dtype)


def per_head_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cache: PerHeadKv,
    batch: AttentionBatch,
    scale: float,
) -> Tensor:
    """Caches the new rows and attends.

    queries [n, heads, d], keys [n, kv_heads, d] (both rotated), values [n, kv_heads, v].
    Returns [n, heads, v].
    """
    keys, values = keys.to(cache.keys.dtype), values.to(cache.values.dtype)  # as they will be read
    write_slots(cache.keys, batch.slot_mapping, keys)
    write_slots(cache.values, batch.slot_mapping, values)
    out = queries.new_empty(*queries.shape[:2], values.shape[-1])
    decodes = batch.decodes
    if decodes is not None:
        chosen = queries if decodes.rows is None else queries[decodes.rows]
        past_keys = gather_blocks(cache.keys, decodes.block_tables)  # [b, t, kv_heads, d]
        past_values = gather_valid(cache.values, decodes.block_tables, decodes.mask)
        result = decode_attention(chosen, past_keys, past_values, decodes.mask, scale)
        if decodes.rows is None:
            return result
        out.index_copy_(0, decodes.rows, result)
    for part in batch.prefills:
        rows = slice(part.start, part.end)
        past_keys = all_rows(cache.keys, keys, part)
        past_values = all_rows(cache.values, values, part)
        out[rows] = prefill_attention(queries[rows], past_keys, past_values, scale)
    return out


def all_rows(blocks: Tensor, new: Tensor, part: PrefillRows) -> Tensor:
    """What the sequence has cached so far, [seq_len, …]; its new rows are in the cache."""
    if part.is_first:
        return new[part.start : part.end]
    return gather_blocks(blocks, part.block_table)[: part.seq_len]
