"""How a caller's dispatch is checked and cut into parts that fit a slot.

Knows shapes. Knows neither slots nor wires.
"""

import torch

from moe_core.transport.base import Dispatch, LinkSpec


def check_shapes(dispatch: Dispatch, spec: LinkSpec) -> int:
    """The number of tokens. Raises ValueError naming the tensor, what it is and what the link
    carries."""
    _, hidden_states, physical_ids, topk_weights = dispatch
    num_tokens = hidden_states.shape[0]
    routing = (num_tokens, spec.num_columns)
    if (
        hidden_states.shape != (num_tokens, spec.hidden_size)
        or hidden_states.dtype is not spec.dtype
        or physical_ids.shape != routing
        or physical_ids.dtype is not torch.int32
        or topk_weights.shape != routing
        or topk_weights.dtype is not torch.float32
    ):
        _refuse(dispatch, num_tokens, spec)
    return num_tokens


def _refuse(dispatch: Dispatch, num_tokens: int, spec: LinkSpec) -> None:
    wanted = (
        ("hidden_states", dispatch.hidden_states, spec.dtype, spec.hidden_size),
        ("physical_ids", dispatch.physical_ids, torch.int32, spec.num_columns),
        ("topk_weights", dispatch.topk_weights, torch.float32, spec.num_columns),
    )
    for name, tensor, dtype, width in wanted:
        if tensor.dtype is not dtype or tensor.shape != (num_tokens, width):
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; this link carries "
                f"{dtype} {[num_tokens, width]}"
            )


def split(dispatch: Dispatch, chunk_tokens: int) -> list[tuple[slice, Dispatch]]:
    """The chunks in order, each with its rows of the whole."""
    num_tokens = dispatch.num_tokens
    if num_tokens <= chunk_tokens:
        return [(slice(0, num_tokens), dispatch)]
    starts = range(0, num_tokens, chunk_tokens)
    rows = [slice(start, min(start + chunk_tokens, num_tokens)) for start in starts]
    return [(part, _part_of(dispatch, chunk, part)) for chunk, part in enumerate(rows)]


def _part_of(dispatch: Dispatch, chunk: int, rows: slice) -> Dispatch:
    return Dispatch(
        key=dispatch.key._replace(chunk=chunk),
        hidden_states=dispatch.hidden_states[rows],
        physical_ids=dispatch.physical_ids[rows],
        topk_weights=dispatch.topk_weights[rows],
    )
