"""Protobuf messages of the exchange ↔ tensors and small dataclasses.

Knows expert.proto and torch's memory. Knows no stream, no slot and no peer's state; what a message
declares is checked against its bytes before anything is allocated.
"""

import torch

from moe_core.errors import ProtocolError
from moe_core.pb.epserve.v1 import expert_pb2 as pb
from moe_core.transport.base import Dispatch, DispatchKey, LinkSpec
from moe_core.transport.layout import SlotLayout


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The values of `tensor` in row-major order, in this machine's (little) byte order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def bytes_tensor(data: bytes, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    """[rows, columns] in memory of its own. The caller has checked the length."""
    if not data:
        return torch.empty(rows, columns, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(rows, columns)


def key_message(key: DispatchKey) -> pb.Key:
    return pb.Key(
        placement_epoch=key.placement_epoch,
        step=key.step,
        layer_id=key.layer_id,
        microbatch=key.microbatch,
        chunk=key.chunk,
        attempt=key.attempt,
    )


def read_key(key: pb.Key) -> DispatchKey:
    return DispatchKey(
        key.placement_epoch, key.step, key.layer_id, key.microbatch, key.chunk, key.attempt
    )


def dispatch_message(slot: int, sequence: int, dispatch: Dispatch) -> pb.DispatchMessage:
    return pb.DispatchMessage(
        tag=pb.Tag(slot=slot, sequence=sequence),
        key=key_message(dispatch.key),
        num_tokens=dispatch.num_tokens,
        hidden_states=tensor_bytes(dispatch.hidden_states),
        physical_ids=tensor_bytes(dispatch.physical_ids),
        topk_weights=tensor_bytes(dispatch.topk_weights),
    )


def read_dispatch(message: pb.DispatchMessage, spec: LinkSpec) -> Dispatch:
    """Raises ProtocolError when a tensor has not the bytes that `num_tokens` asks for."""
    num_tokens = message.num_tokens
    layout = SlotLayout(spec)
    index_bytes = layout.index_bytes(num_tokens)
    hidden_states, ids, weights = (
        message.hidden_states,
        message.physical_ids,
        message.topk_weights,
    )
    check_length("hidden_states", hidden_states, layout.payload_bytes(num_tokens), num_tokens)
    check_length("physical_ids", ids, index_bytes, num_tokens)
    check_length("topk_weights", weights, index_bytes, num_tokens)
    return Dispatch(
        key=read_key(message.key),
        hidden_states=bytes_tensor(hidden_states, spec.dtype, num_tokens, spec.hidden_size),
        physical_ids=bytes_tensor(ids, torch.int32, num_tokens, spec.num_columns),
        topk_weights=bytes_tensor(weights, torch.float32, num_tokens, spec.num_columns),
    )


def check_length(name: str, data: bytes, wanted: int, num_tokens: int) -> None:
    if len(data) != wanted:
        raise ProtocolError(
            f"{name} carries {len(data)} bytes where {num_tokens} tokens take {wanted}"
        )
