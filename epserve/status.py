"""`epserve status`: a running cluster's members and links, as tables or as JSON.

Knows the cluster state as plain values; changes nothing.
"""

import asyncio
import json
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from epserve.client import EpserveClient, Target
from epserve.layout import describe_sizes
from moe_core.cluster import ClusterState, LinkStats, Member, MemberState, Role

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
    console.print(members_table(state))
    if links(state):
        console.print(links_table(state))


def links(state: ClusterState) -> list[LinkStats]:
    """Every link, as the attention processes count them."""
    return [link for member in in_tier_order(state) for link in member.links]


def status_document(state: ClusterState) -> dict[str, object]:
    """What `status --json` prints; ranks that a role does not have are null."""
    return {
        "placement_epoch": state.placement.epoch,
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
    table = Table()
    for column in ("process", "ranks", "experts", "device", "address", "pid", "state"):
        table.add_column(
            column,
            justify="right" if column in ("experts", "pid") else "left",
            no_wrap=column in ("process", "address", "pid"),
            overflow="fold",  # a narrow terminal must not cost what is to be read
        )
    for member in in_tier_order(state):
        table.add_row(
            member_name(member),
            _ranks_words(member),
            str(member.experts) if member.experts else "",
            member.device,
            member.address,
            str(member.pid),
            _state_words(member),
        )
    return table


def in_tier_order(state: ClusterState) -> list[Member]:
    """Gateway, attention tier, expert tier; each in rank order."""
    return [member for role in Role for member in state.tier(role)]


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


def member_name(member: Member) -> str:
    """A gateway that is alone needs no number."""
    first = member.role is Role.GATEWAY and member.rank == 0
    return "gateway" if first else f"{member.role} {member.rank}"


def _ranks_words(member: Member) -> str:
    if member.role is Role.ATTN:
        return f"dp {member.dp_rank}, tp {member.tp_rank}"
    if member.role is Role.EXPERT:
        return f"ep {member.ep_rank}, tp {member.etp_rank}"
    return ""


def _state_words(member: Member) -> str:
    colour = {MemberState.READY: "green", MemberState.FAILED: "red"}.get(member.state, "yellow")
    words = f"[{colour}]{member.state}[/]"
    return f"{words} {escape(member.detail)}" if member.detail else words
