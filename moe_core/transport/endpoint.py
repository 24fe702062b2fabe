"""One process's end of all its NIXL links: one agent, and the one place that polls it.

Knows when to poll: *spin briefly, then park*. Knows no slot and no tensor: notifications go to the
receiver that their sender's name is registered for.

While spinning, the poll runs once per turn of the event loop. Parked, it runs every `park_poll_ms`
while a link is busy or was a moment ago, and rarely after that, and whenever the doorbell rings;
before its first sleep it says in the doorbell's flag that it sleeps and polls once more, so a peer
either sees the flag or has its message seen.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch

from moe_core.transport.base import Identity, TransportOptions
from moe_core.transport.doorbell import Doorbell
from moe_core.transport.host import HostProcess
from moe_core.transport.nixl_agent import NixlAgent
from moe_core.transport.retired import RetiredMemory

CLOSE_SPINS = 10  # arrivals within so many times `spin_us` of each other are close
POLLS_PER_TURN = 12  # of the event loop, whose turn costs as much as a few polls
IDLE_AFTER_S = 1.0
IDLE_POLLS = 16  # park_poll_ms times this, once idle
BELL_SPIN_S = 500e-6  # a bell promises a message: look for it this long
WRITE_SPIN_S = 20e-3  # large writes make progress only while polled
NUDGE_AFTER_S = 500e-6  # and some (over TCP) only while their target polls

Finished = Callable[[Exception | None], None]
Action = Callable[[], object]


class Awaited(Protocol):
    """What somebody is about to wait for."""

    @property
    def wanted(self) -> bool:
        """It has not come yet."""
        ...


class Receiver(Protocol):
    """A link's end, as the endpoint sees it."""

    @property
    def busy(self) -> bool:
        """Something is outstanding."""
        ...

    def received(self, note: bytes) -> None: ...


class Write:
    """A posted write that was not done at once."""

    __slots__ = ("finished", "handle", "nudge", "posted_at")

    def __init__(self, handle: Any, finished: Finished, nudge: Action, posted_at: float) -> None:  # noqa: ANN401
        self.handle = handle
        self.finished = finished
        self.nudge: Action | None = nudge
        self.posted_at = posted_at


class NixlEndpoint:
    """Build it on the event loop that its links will use; every call is made there."""

    def __init__(self, identity: Identity, options: TransportOptions) -> None:
        """Raises NixlUnavailable."""
        # Unique per start and per agent, so no peer ever takes one for another.
        unique = os.urandom(4).hex()
        self.agent = NixlAgent(f"epserve-{identity.rank}-{identity.instance_epoch:x}-{unique}")
        self.options = options
        self.process = HostProcess.this()
        self.doorbell = Doorbell()
        self.retired = RetiredMemory(options.retired_bytes)
        self._loop = asyncio.get_running_loop()
        self._receivers: dict[str, Receiver] = {}
        self._writes: list[Write] = []
        self._copies: list[tuple[Any, Action]] = []
        self._peers: Counter[str] = Counter()
        self._closed = False
        self._spin_s = options.spin_us * 1e-6
        self._spin_for = self._spin_s  # never less
        self._spin_until = 0.0
        self._spinning = False
        self._active_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._loop.add_reader(self.doorbell.fileno(), self._rung)

    def attach(self, sender: str, receiver: Receiver) -> None:
        """Notifications of the agent called `sender` go to `receiver` from now on."""
        self._receivers[sender] = receiver
        self.spin()

    def detach(self, sender: str, receiver: Receiver) -> None:
        if self._receivers.get(sender) is receiver:
            del self._receivers[sender]

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 on the device that the options name."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.options.devices[0])

    def add_peer(self, name: str, metadata: bytes) -> None:
        """Every call is undone by one `remove_peer`; the agent forgets the peer with the last."""
        self.agent.add_peer(name, metadata)
        self._peers[name] += 1

    def remove_peer(self, name: str) -> None:
        self._peers[name] -= 1
        if not self._peers[name]:
            del self._peers[name]
            self.agent.remove_peer(name)

    def after_copies(self, action: Action) -> None:
        """Call `action` once what the current CUDA stream holds by now has been done."""
        event: Any = torch.Event(self.options.devices[0])
        event.record()
        self._copies.append((event, action))
        self.spin()

    def follow(self, handle: Any, finished: Finished, nudge: Action) -> None:  # noqa: ANN401
        """Poll a posted write to its end: `finished(None)`, or `finished(error)` where NIXL says
        that the peer is gone. `nudge` wakes the target, should it have to take part."""
        self._writes.append(Write(handle, finished, nudge, time.monotonic()))
        self.spin()

    def forget(self, handle: Any) -> None:  # noqa: ANN401
        """The handle is about to be released."""
        self._writes = [write for write in self._writes if write.handle is not handle]

    def spin(self, for_s: float | None = None) -> None:
        """Poll at every turn of the loop for a while (`spin_us` if not said)."""
        wanted = time.monotonic() + (self._spin_for if for_s is None else for_s)
        self._spin_until = max(self._spin_until, wanted)
        if not self._spinning:
            self._unpark()
            self._spinning = True
            self._loop.call_soon(self._spin)

    def poll_while(self, awaited: Awaited) -> None:
        """Poll here and now, for at most `spin_us`, while `awaited` is wanted, and go on at every
        turn of the loop if it still is: an answer that is on its way costs no turn."""
        self.spin()
        until = time.monotonic() + self._spin_s
        while awaited.wanted and time.monotonic() < until:
            if not self.poll():
                os.sched_yield()

    def poll(self) -> bool:
        """Make progress once; True if something arrived."""
        if self._copies:
            self._check_copies()
        if self._writes:
            self._check_writes()
        notes = self.agent.notifications()
        for sender, messages in notes.items():
            for message in messages:
                receiver = self._receivers.get(sender)
                if receiver is not None:
                    receiver.received(message)
        return bool(notes)

    def _check_copies(self) -> None:
        done = [copy for copy in self._copies if copy[0].query()]
        for copy in done:
            self._copies.remove(copy)
            copy[1]()

    def _check_writes(self) -> None:
        for write in tuple(self._writes):
            error: Exception | None = None
            try:
                if not self.agent.done(write.handle):
                    self._nudge(write)
                    continue
            except self.agent.failures as failure:
                error = failure
            self._writes.remove(write)
            write.finished(error)

    def _nudge(self, write: Write) -> None:
        if write.nudge is not None and time.monotonic() - write.posted_at > NUDGE_AFTER_S:
            write.nudge()
            write.nudge = None

    def _spin(self) -> None:
        if self._closed:
            return
        for _ in range(POLLS_PER_TURN):
            if self.poll():
                break
            os.sched_yield()  # else two pollers on one core take turns of milliseconds
        else:
            self._spin_on()
            return
        self._expect_another()
        self._loop.call_soon(self._spin)

    def _expect_another(self) -> None:
        """Spin on after an arrival: longer than `spin_us` where arrivals follow one another so
        closely that the next one will most likely come while we do."""
        now = time.monotonic()
        gap = now - self._active_at
        close = gap < CLOSE_SPINS * self._spin_s
        self._spin_for = max(self._spin_s, 2 * gap) if close else self._spin_s
        self._active_at = now
        self._spin_until = now + self._spin_for

    def _spin_on(self) -> None:
        now = time.monotonic()
        young = self._writes and now - self._writes[-1].posted_at < WRITE_SPIN_S
        if self._copies or young or now < self._spin_until:
            self._loop.call_soon(self._spin)
        else:
            self._park()

    def _park(self) -> None:
        self._spinning = False
        self.doorbell.set_parked(True)
        if self.poll():
            self._expect_another()
            self.spin()
        elif self._timer is None:
            self._timer = self._loop.call_later(self._period(), self._tick)

    def _period(self) -> float:
        period = self.options.park_poll_ms * 1e-3
        busy = self._writes or any(receiver.busy for receiver in self._receivers.values())
        idle = not busy and time.monotonic() - self._active_at > IDLE_AFTER_S
        return period * IDLE_POLLS if idle else period

    def _tick(self) -> None:
        self._timer = None
        if self.poll():
            self._expect_another()
            self.spin()
        elif self._receivers or self._writes:
            self._timer = self._loop.call_later(self._period(), self._tick)

    def _unpark(self) -> None:
        self.doorbell.set_parked(False)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _rung(self) -> None:
        self.doorbell.drain()
        self.spin(max(self._spin_s, BELL_SPIN_S))

    def close(self) -> None:
        """After all links have been closed; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._unpark()
        self._loop.remove_reader(self.doorbell.fileno())
        self._receivers.clear()
        self.doorbell.close()
        self.retired.close()
