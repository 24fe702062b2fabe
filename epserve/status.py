"""`epserve status`: a running cluster's members, those that it lacks, and its links, as tables or
as JSON.

Knows the cluster state as plain values; changes nothing.
"""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from epserve.client import EpserveClient
from epserve.gateway_connection import Target
from epserve.layout import describe_sizes, name_of
from moe_core.cluster import ClusterState, LinkStats, Member, MemberState, Role, TierSizes

MAX_ABSENT = 8
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
    "detail",
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


def status(target: Target, *, as_json: bool) -> None:
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
    if state.target is not None:
        console.print(f"the tiers are to have {_size_words(state.target)}", soft_wrap=True)
    console.print(members_table(state))
    for line in details(state):
        console.print(line, soft_wrap=True)
    if links(state):
        console.print()
        console.print(links_table(state))


def links(state: ClusterState) -> list[LinkStats]:
    """Every link, as the attention processes count them."""
    return [link for member in in_tier_order(state) for link in member.links]


def status_document(state: ClusterState) -> dict[str, object]:
    """What `status --json` prints; ranks that a role does not have are null. `sizes` are those in
    force, `target` those that the tiers are to get: null unless they are changing."""
    return {
        "placement_epoch": state.placement.epoch,
        "sizes": asdict(TierSizes.of(state.parallel)),
        "target": None if state.target is None else asdict(state.target),
        "members": [
            {name: getattr(member, name) for name in _MEMBER_FIELDS}
            | {"metrics": _metrics(member), "queued_requests": _queued(member)}
            for member in in_tier_order(state)
        ],
        "links": [{name: getattr(link, name) for name in _LINK_FIELDS} for link in links(state)],
    }


def _metrics(member: Member) -> dict[str, float] | None:
    """What an attention group's tp_rank 0 counts; None of other processes."""
    if member.attention_load is None or member.engine_metrics is None:
        return None
    return asdict(member.attention_load) | asdict(member.engine_metrics)


def _queued(member: Member) -> int | None:
    """Of a gateway: requests that wait in it. None of other processes."""
    return member.queued_requests if member.role is Role.GATEWAY else None


def members_table(state: ClusterState) -> Table:
    """Members, and ranks that no process has; what a member says of itself is in `details`."""
    table = plain_table()
    for column in ("process", "ranks", "experts", "device", "address", "pid", "state"):
        number = column in ("experts", "pid")
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    table.columns[-1].overflow = "fold"
    missing = list(absent(state))
    for role in Role:
        for member in state.tier(role):
            table.add_row(*_cells(member))
        ranks = [rank for missing_role, rank in missing if missing_role is role]
        for rank in ranks[:MAX_ABSENT]:
            table.add_row(name_of(role, rank), "", "", "", "", "", "[red]not joined[/]")
        if len(ranks) > MAX_ABSENT:
            more = f"+{len(ranks) - MAX_ABSENT} more"
            table.add_row(more, "", "", "", "", "", "[red]not joined[/]")
    return table


def _cells(member: Member) -> tuple[str, ...]:
    colour = {MemberState.READY: "green", MemberState.FAILED: "red"}.get(member.state, "yellow")
    return (
        member_name(member),
        _ranks_words(member),
        str(member.experts) if member.experts else "",
        member.device,
        member.address,
        str(member.pid),
        f"[{colour}]{member.state}[/]",
    )


def details(state: ClusterState) -> list[Text]:
    """What members say of themselves, a line each: too long for a cell of the table."""
    return [
        Text(f"{member_name(member)} {member.state}: {member.detail}", style="yellow")
        for member in in_tier_order(state)
        if member.detail
    ]


def plain_table(title: str | None = None) -> Table:
    """Without lines between columns: a terminal of 80 columns has room for words, then."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )


def absent(state: ClusterState) -> Iterator[tuple[Role, int]]:
    """The ranks that the tiers are to have and that no process has: it is starting, was lost, or
    was asked to leave."""
    for role in (Role.ATTN, Role.EXPERT):
        there = {member.rank for member in state.tier(role)}
        wanted = state.size(role) if state.target is None else state.target.by_role[role]
        yield from ((role, rank) for rank in range(wanted) if rank not in there)


def in_tier_order(state: ClusterState) -> list[Member]:
    """Gateway, attention tier, expert tier; each in rank order."""
    return [member for role in Role for member in state.tier(role)]


def links_table(state: ClusterState) -> Table:
    table = plain_table("Between the tiers")
    for column in ("from", "to", "transport"):
        table.add_column(column, no_wrap=True)
    for column in ("dispatches", "dispatched", "combined"):
        table.add_column(column, justify="right", no_wrap=True, overflow="fold")
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


def member_name(member: Member) -> str:
    """A gateway that is alone needs no number."""
    first = member.role is Role.GATEWAY and member.rank == 0
    return "gateway" if first else f"{member.role} {member.rank}"


def _size_words(sizes: TierSizes) -> str:
    return f"{sizes.attn_devices} attention and {sizes.expert_devices} expert processes"


def _ranks_words(member: Member) -> str:
    if member.role is Role.ATTN:
        return f"dp {member.dp_rank} tp {member.tp_rank}"
    if member.role is Role.EXPERT:
        return f"ep {member.ep_rank} tp {member.etp_rank}"
    return ""
