"""The contract between the attention side and the expert side of an exchange.

Knows what a dispatch and a combine are, who owns which memory when, and what every
transport must promise. Knows no wire (local.py, grpc_link.py and nixl_link.py do), no model, no
placement: `physical_ids` are opaque numbers here.

Invariants that hold for all transports, and that tests/contract checks:

* A dispatch owns one slot on each side until its combine has been released, so the number of
  slots is the flow control. A batch larger than a slot travels in chunks; the link splits it
  and joins the partials again, and its caller sees one dispatch and one combine.
* `ExpertLink.dispatch` returns only when the bytes have left: after it the caller may reuse
  its tensors. No combine needs the caller's help to arrive.
* What the handler is given are views into the slot: valid until `Reply.complete` or
  `Reply.fail` has been called. What a waiter is given is valid until `PendingCombine.release`.
* Every wait has a deadline, and its error names peer, layer, bytes and phase.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from moe_core.errors import ConfigError, EpserveError

TRANSPORTS = ("auto", "nixl", "grpc")


# Named tuples, where the rest of epserve has frozen dataclasses: one of each is made at every hop,
# and a frozen dataclass takes three times as long to make.
class DispatchKey(NamedTuple):
    """Names one dispatch among all that its attention process has ever sent."""

    placement_epoch: int
    step: int
    layer_id: int
    microbatch: int = 0
    chunk: int = 0
    attempt: int = 0


class Dispatch(NamedTuple):
    """Tokens on their way to one expert process.

    hidden_states: [num_tokens, hidden_size], the link's dtype.
    physical_ids:  [num_tokens, num_columns] int32, -1 where the expert is not this process's.
    topk_weights:  [num_tokens, num_columns] float32.
    """

    key: DispatchKey
    hidden_states: torch.Tensor
    physical_ids: torch.Tensor
    topk_weights: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.hidden_states.shape[0]


class Combine(NamedTuple):
    """One process's weighted partial sums for the tokens of one dispatch.

    partial: [num_tokens, hidden_size], the link's dtype. May lie in the slot: valid until
    `PendingCombine.release`.
    """

    key: DispatchKey
    partial: torch.Tensor
    queue_us: int
    compute_us: int


@dataclass(slots=True)
class LinkCounters:
    """Running totals of one link. Payload means hidden states and partials only, so that the
    totals equal the formula `tokens · hidden_size · itemsize`."""

    dispatches: int = 0
    dispatch_tokens: int = 0
    dispatch_bytes: int = 0
    combine_bytes: int = 0
    routing_bytes: int = 0  # physical_ids and topk_weights
    stream_tensor_bytes: int = 0  # tensor bytes that travelled inside gRPC messages
    doorbells: int = 0  # rung by this end
    wait_s: float = 0.0  # seconds that the caller waited for combines, by its own account
    dropped: int = 0  # answers that came after their waiter had gone, and tags that match nothing


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """What both ends of a link must agree on; the Hello carries it.

    hidden_size and num_columns are the widths of the tensors, slot_tokens the most tokens one
    slot holds, slot_count the dispatches that may be in flight.
    """

    model_fingerprint: str
    dtype: torch.dtype
    hidden_size: int
    num_columns: int
    slot_tokens: int
    slot_count: int


ANY_WORLD = 0


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this end is: its rank in its tier of `world` processes, and which start of it. Of a peer
    whose tier may have grown or shrunk since it started, the world is ANY_WORLD."""

    rank: int
    world: int
    instance_epoch: int


class Reply(Protocol):
    """How the expert side answers one dispatch; exactly one of the two calls, once."""

    @property
    def source_epoch(self) -> int:
        """Which start of the attention process has sent the dispatch."""

    def complete(self, partial: torch.Tensor, queue_us: int, compute_us: int) -> None:
        """`partial` [num_tokens, hidden_size] is copied before this returns."""

    def fail(self, error: EpserveError) -> None: ...


DispatchHandler = Callable[[Dispatch, Reply], None]
"""The expert side's entry: called on the event loop, must not block; it answers later."""


class PendingCombine(Protocol):
    """A dispatch that is under way."""

    async def left(self, timeout_s: float) -> None:
        """Until its bytes have left. Raises PeerTimeoutError or PeerLostError."""

    @property
    def done(self) -> bool:
        """The answer is there, or it is known that none will come."""

    @property
    def owed(self) -> bool:
        """The peer has yet to answer, be it still wanted or not: a slot is taken."""

    async def settled(self, timeout_s: float) -> bool:
        """Wait until it is `done`; False where it is not within `timeout_s`. Whatever comes of
        this wait, the answer stays wanted."""

    def result(self) -> Combine:
        """Of what is `done`. Raises PeerLostError, or the error with which the peer failed it."""

    def answered_chunks(self) -> tuple[tuple[slice, ...], torch.Tensor] | None:
        """Of one that failed: which rows were answered all the same, and the partials, of which
        only those rows mean something. None where there are none."""

    async def wait(self, timeout_s: float) -> Combine:
        """Raises PeerTimeoutError, and what `result` does. After a cancelled wait, as after one
        that raised, the answer is not wanted."""

    def release(self) -> None:
        """The combine has been consumed, or is not wanted: its slot is free as soon as the answer
        is there (a late one is dropped) or the peer has gone. Once for every dispatch, whatever
        came of it; further calls do nothing."""


class ExpertLink(ABC):
    """The attention side's end of a link to one expert process."""

    peer: str  # as errors name it, e.g. "expert 3 (127.0.0.1:4711)"
    transport: str
    counters: LinkCounters

    @property
    @abstractmethod
    def lost_because(self) -> str | None:
        """Why the peer is gone for good, or None while it is there. Such a link never recovers."""

    def try_dispatch(self, dispatch: Dispatch) -> PendingCombine | None:
        """Start to send without waiting for anything: after it the caller may reuse its tensors,
        and `left` says when the bytes have left. None, with nothing sent, where `dispatch` would
        wait for a slot. Raises as `dispatch` does."""
        return None

    @abstractmethod
    async def dispatch(self, dispatch: Dispatch, timeout_s: float) -> PendingCombine:
        """Send, waiting for free slots if need be. Zero tokens are allowed.

        Raises PeerTimeoutError when no slot becomes free in time, PeerLostError when the peer
        is gone (unless some chunks have been answered: then that is the result), ValueError when
        the tensors do not fit the LinkSpec.
        """

    @abstractmethod
    def lose(self, reason: str) -> None:
        """Count the peer as gone, whatever it still says: pending combines and waits fail with
        PeerLostError at once, and answers that come later are dropped."""

    @abstractmethod
    async def close(self) -> None:
        """End the exchange; pending combines fail with PeerLostError."""


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """How a process waits and which wire it asks for.

    transport: "auto", "nixl" or "grpc". spin_us: how long to poll before parking.
    park_poll_ms: how often to poll while parked, since NIXL makes progress only when called.
    devices: where the slots lie (the first). retired_bytes: the most memory that may be held
    back because a peer that cannot be reached any more might still write it (see retired.py).
    """

    transport: str = "auto"
    spin_us: float = 50.0
    park_poll_ms: float = 4.0
    connect_timeout_s: float = 10.0
    spare_slots: int = 2
    devices: tuple[str, ...] = ("cpu",)
    retired_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if self.transport not in TRANSPORTS:
            raise ConfigError("transport", self.transport, "not a transport", TRANSPORTS)
        for name in ("spin_us", "park_poll_ms", "connect_timeout_s", "retired_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "must not be negative", (0,))
