"""What an attention process does beside its duty: it follows the cluster, and tells it how it is.

Knows the membership, the links to the expert processes, the placements, and the duty's figures.
Knows no order of starting and ending (process.py does), and nothing of how links are made.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from attn_service.duties import Duty, Leading
from attn_service.expert_links import ExpertLinks
from attn_service.placements import Placements
from moe_core.cluster import MemberState, Role
from moe_core.errors import UnavailableError
from moe_core.placement import ExpertPlacement
from moe_core.service.membership import Membership

CONNECT_TIMEOUT_S = 60.0
TICK_S = 0.5
EXPERT_LOAD_S = 5.0  # large models have 15,000 experts, and counts wait for the device


async def connect_enough(
    membership: Membership, links: ExpertLinks, placements: Placements, arrival_timeout_s: float
) -> None:
    """Until `links` are enough to serve the latest placement with, which is among `placements`
    then. Raises UnavailableError naming what is missing."""
    deadline: float | None = None
    while True:
        state = await membership.wait_until(
            lambda state: state.holds_all_experts(state.placement),
            arrival_timeout_s,
            "the expert processes",
        )
        placements.add(state.placement)
        await links.reconcile(state)
        if links.can_serve(placements.newest):
            return
        now = asyncio.get_running_loop().time()
        deadline = deadline or now + CONNECT_TIMEOUT_S
        if now > deadline:
            raise UnavailableError("; ".join(links.missing))
        await asyncio.sleep(TICK_S)


class ClusterUpkeep:
    """set_ready: says whether this process is, to whoever asks its port."""

    def __init__(
        self,
        membership: Membership,
        links: ExpertLinks,
        placements: Placements,
        duty: Duty,
        set_ready: Callable[[bool], None],
        store_address: str,
    ) -> None:
        self._membership = membership
        self._links = links
        self._placements = placements
        self._duty = duty
        self._set_ready = set_ready
        self._store_address = store_address
        self._used_epoch: int | None = placements.newest.epoch  # see StatusReport
        self._state = MemberState.READY
        self._last_report: object = None

    def jobs(self) -> tuple[Coroutine[Any, Any, None], ...]:
        """To be run while the process serves. They end as the membership does, or with their
        tasks."""
        return self._keep_up(), self._heed_failures(), self._report_expert_load()

    def drain(self) -> None:
        """The process is READY no more."""
        self._state = MemberState.DRAINING
        self.report()

    def report(self) -> None:
        """Tell the gateway what is new."""
        # READY without some experts too: what needs them waits, what does not is served.
        state, detail = self._state, "; ".join(self._links.missing)
        load, metrics = self._duty.load, self._duty.metrics
        links = self._links.stats(f"{Role.ATTN} {self._membership.rank}")
        if (report := (state, detail, load, metrics, links, self._used_epoch)) == self._last_report:
            return
        self._last_report = report
        self._set_ready(state is MemberState.READY)
        self._membership.report(
            state,
            detail=detail,
            store_address=self._store_address,
            attention_load=load,
            engine_metrics=metrics,
            links=links,
            used_epoch=self._used_epoch,
        )

    async def _keep_up(self) -> None:
        """Follow the cluster's state with the links, and tell the gateway how things are."""
        while True:
            await asyncio.sleep(TICK_S)
            state = self._membership.state
            if await self._links.reconcile(state) and isinstance(self._duty, Leading):
                self._duty.engine.wake()
            self._adopt(self._membership.state.placement)
            self.report()

    async def _heed_failures(self) -> None:
        """As soon as the cluster says that a process has failed."""
        while True:
            state = self._membership.state
            self._links.give_up(state)
            await self._membership.next_state(state)

    async def _report_expert_load(self) -> None:
        """From time to time, and only what is new."""
        reported = None
        while True:
            await asyncio.sleep(EXPERT_LOAD_S)
            load = self._duty.expert_load
            if load is not None and load != reported:
                self._membership.report_expert_load(load)
                reported = load

    def _adopt(self, latest: ExpertPlacement) -> None:
        """Steps that are planned from now on use it, once its experts can be reached. A rank that
        follows knows it at once, since the leader may."""
        placements = self._placements
        is_new = latest.epoch > placements.newest.epoch
        if is_new and (not isinstance(self._duty, Leading) or self._links.can_serve(latest)):
            placements.add(latest)
        placements.forget_unused()
        self._used_epoch = placements.oldest_in_use
