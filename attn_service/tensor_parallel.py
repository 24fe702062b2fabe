"""Attention tensor parallelism inside one DP group, over torch.distributed.

Knows one process group (gloo on CPUs, NCCL on GPUs), the TCP store it forms over, and a
deadline for every collective. Knows neither layers nor schedules: that all ranks call the same
collectives in the same order is the step plans' doing.

A collective that fails or times out leaves the group unusable, so it raises GroupLostError and
the group is never repaired: its processes end, and new ones form a group of their own.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

# torch exports these, but does not say so to type checkers.
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # torch exports it silently

from moe_core.errors import UnavailableError
from moe_core.service.binding import is_loopback

Tensor = torch.Tensor
T = TypeVar("T")


class GroupLostError(UnavailableError):
    """A rank of this attention TP group is gone, and the group with it."""


@dataclass(frozen=True, slots=True)
class GroupRank:
    """Which rank of which group; `str` is how errors name it."""

    dp_rank: int
    tp_rank: int
    tp_size: int

    def __str__(self) -> str:
        return f"attention group dp_rank={self.dp_rank} (tp_rank {self.tp_rank} of {self.tp_size})"


class DistributedTensorParallel:
    """The TensorParallel of moe_core.model over the process group that `form` made."""

    def __init__(self, group: GroupRank, timeout_s: float) -> None:
        self.rank = group.tp_rank
        self.size = group.tp_size
        self._group = group
        self._timeout_s = timeout_s

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, bitwise the same on each; `x` itself is overwritten with it."""
        x = x.contiguous()
        if x.numel() == 0:
            return x
        with self._named("all_reduce"):
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """The ranks' parts [sizes[rank], …] joined along dim 0; parts may be empty."""
        if x.shape[0] != sizes[self.rank]:
            raise ValueError(f"all_gather: {x.shape[0]} rows, but sizes={list(sizes)}")
        rows = max(sizes)
        padded = x.new_zeros((rows, *x.shape[1:]))  # equal parts: gloo knows no others
        padded[: x.shape[0]] = x
        if padded.numel() == 0:
            return padded
        parts = [torch.empty_like(padded) for _ in sizes]
        with self._named("all_gather"):
            dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @contextmanager
    def _named(self, collective: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise GroupLostError(
                f"{self._group} lost a rank in {collective} (deadline {self._timeout_s:g} s): "
                f"{_first_line(error)}"
            ) from error


def open_store(host: str, tp_size: int, timeout_s: float) -> TCPStore:
    """The group's store, listening on a free port; for tp_rank 0, which peers reach at `host`. Its
    port is `.port`."""
    timeout = timedelta(seconds=timeout_s)
    if not is_loopback(host):
        return TCPStore("localhost", 0, tp_size, True, timeout, wait_for_workers=False)
    # Left to itself, torch listens on every address of the machine.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        tp_size,
        True,
        timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def join_store(host: str, port: int, tp_size: int, timeout_s: float) -> TCPStore:
    """The store of the group's tp_rank 0. Raises GroupLostError when nobody answers."""
    return bounded(
        lambda: TCPStore(
            host, port, tp_size, False, timedelta(seconds=timeout_s), wait_for_workers=False
        ),
        f"the TP store of tp_rank 0 at {host}:{port} did not answer within {timeout_s:g} s",
    )


def form(
    group: GroupRank, store: Store, device: torch.device, timeout_s: float
) -> DistributedTensorParallel:
    """Meet the other ranks; blocks until all have come. Raises GroupLostError when one does not
    come within `timeout_s`, which is also every later collective's deadline."""
    on_cuda = device.type == "cuda"
    bounded(
        lambda: dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=store,
            rank=group.tp_rank,
            world_size=group.tp_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if on_cuda else None,
        ),
        f"{group} did not form within {timeout_s:g} s",
    )
    return DistributedTensorParallel(group, timeout_s)


def dissolve() -> None:
    """Forget the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def bounded(action: Callable[[], T], what: str) -> T:
    """What `action` returns. Raises GroupLostError, beginning with `what`, where torch fails."""
    try:
        return action()
    except RuntimeError as error:
        raise GroupLostError(f"{what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
