"""`epserve status`: a running cluster's members and links, as tables or as JSON.

Knows the cluster state as plain values; changes nothing.
"""

import asyncio
import json

from rich.console import Console
from rich.table import Table

from epserve.client import EpserveClient
from epserve.layout import describe_sizes
from moe_core.cluster import ClusterState, LinkStats, Member, MemberState

_MEMBER_FIELDS = (
    "role",
    "rank",
    "dp_rank",
    "tp_rank",
    "ep_rank",
    "etp_rank",
    "pid",
    "address",
    "device",
    "state",
    "experts",
)
_LINK_FIELDS = (
    "source",
    "target",
    "transport",
    "dispatch_bytes",
    "combine_bytes",
    "dispatches",
)


def status(target: str, *, as_json: bool) -> None:
    """Print the state of the cluster behind `target`. Raises EpserveError."""

    async def ask() -> ClusterState:
        async with EpserveClient(target) as client:
            return await client.cluster()

    state = asyncio.run(ask())
    if as_json:
        print(json.dumps(status_document(state)))
        return
    console = Console(highlight=False)
    epoch = state.placement.epoch
    console.print(f"{describe_sizes(state.parallel)}, placement epoch {epoch}", soft_wrap=True)
    console.print(members_table(state))
    if links(state):
        console.print(links_table(state))


def links(state: ClusterState) -> list[LinkStats]:
    """Every link, as the attention processes count them."""
    return [link for member in state.members for link in member.links]


def status_document(state: ClusterState) -> dict[str, object]:
    """What `status --json` prints; ranks that a role does not have are null."""
    return {
        "placement_epoch": state.placement.epoch,
        "members": [
            {name: getattr(member, name) for name in _MEMBER_FIELDS} for member in state.members
        ],
        "links": [{name: getattr(link, name) for name in _LINK_FIELDS} for link in links(state)],
    }


def members_table(state: ClusterState) -> Table:
    table = Table()
    for column in ("process", "dp", "tp", "ep", "etp", "experts", "device", "address", "pid"):
        table.add_column(column, justify="left" if column in ("process", "address") else "right")
    table.add_column("state")
    for member in state.members:
        ranks = (member.dp_rank, member.tp_rank, member.ep_rank, member.etp_rank)
        table.add_row(
            f"{member.role} {member.rank}",
            *("" if rank is None else str(rank) for rank in ranks),
            str(member.experts) if member.experts else "",
            member.device,
            member.address,
            str(member.pid),
            _state_words(member),
        )
    return table


def links_table(state: ClusterState) -> Table:
    table = Table(title="Between the tiers", title_justify="left", title_style="bold")
    for column in ("from", "to", "transport"):
        table.add_column(column)
    for column in ("dispatches", "dispatched", "combined"):
        table.add_column(column, justify="right")
    for link in links(state):
        table.add_row(
            link.source,
            link.target,
            link.transport,
            f"{link.dispatches:,}",
            f"{link.dispatch_bytes:,} B",
            f"{link.combine_bytes:,} B",
        )
    return table


def _state_words(member: Member) -> str:
    colour = {MemberState.READY: "green", MemberState.FAILED: "red"}.get(member.state, "yellow")
    words = f"[{colour}]{member.state}[/]"
    return f"{words} {member.detail}" if member.detail else words
