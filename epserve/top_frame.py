"""What `epserve top` shows at one moment: tables of a cluster's state and rates.

Knows how it looks. Asks nobody and keeps nothing.
"""

import heapq
from collections import Counter
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from epserve.layout import describe_sizes
from epserve.rates import ClusterRates
from epserve.status import details, links, members_table
from moe_core.cluster import ClusterState, Member, Role

MAX_MEMBERS = 12  # more are counted, and only those that are not ready are named
MAX_ROWS = 12
HOTTEST = 4
BAR_WIDTH = 6
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def frame(target: str, state: ClusterState, rates: ClusterRates) -> RenderableType:
    """Everything, as one thing to print."""
    sizes = f"{describe_sizes(state.parallel)}, placement epoch {state.placement.epoch}"
    head = f"[bold]epserve[/] {escape(target)}  {sizes}"
    parts: list[RenderableType] = [Text.from_markup(head), *_members(state), _groups(state, rates)]
    if links(state):
        parts.append(_links(state, rates))
    parts.append(_experts(state))
    return Group(*parts)


def _members(state: ClusterState) -> Iterator[RenderableType]:
    if len(state.members) <= MAX_MEMBERS:
        yield members_table(state)
        yield from details(state)
    else:
        yield Text("; ".join(_counted(state, role) for role in (Role.ATTN, Role.EXPERT)))
    missing = [*state.missing(Role.ATTN), *state.missing(Role.EXPERT)]
    if missing:
        shown = "; ".join(missing[:MAX_ROWS]) + _more(len(missing))
        yield Text(f"not ready: {shown}", style="yellow")


def _counted(state: ClusterState, role: Role) -> str:
    states = Counter(str(member.state) for member in state.tier(role))
    words = ", ".join(f"{number} {name}" for name, number in sorted(states.items()))
    return f"{role}: {words or 'none joined'} of {state.size(role)}"


def _groups(state: ClusterState, rates: ClusterRates) -> Table:
    table = _table("Attention groups", "group", "KV tokens in use")
    for column in ("running", "waiting", "tokens/s", "step"):
        table.add_column(column, justify="right")
    leaders = [member for member in state.tier(Role.ATTN) if member.tp_rank == 0]
    for member in leaders[:MAX_ROWS]:
        table.add_row(f"dp {member.dp_rank}", *_load_cells(member), *_rate_cells(member, rates))
    table.caption = _more(len(leaders)) or None
    return table


def _load_cells(member: Member) -> tuple[str, str, str]:
    load = member.attention_load
    if load is None:
        return f"[yellow]{member.state}[/]", "", ""
    used = load.total_kv_blocks - load.free_kv_blocks
    share = used / load.total_kv_blocks if load.total_kv_blocks else 0.0
    bar = "█" * round(share * BAR_WIDTH)
    tokens = load.total_kv_blocks * load.kv_block_size
    cell = f"[cyan]{bar:░<{BAR_WIDTH}}[/] {share:4.0%} of {tokens:,}"
    return cell, str(load.num_running), str(load.num_waiting)


def _rate_cells(member: Member, rates: ClusterRates) -> tuple[str, str]:
    rate = rates.engine(member)
    if rate is None:
        return "–", "–"
    step = "–" if rate.step_s is None else f"{rate.step_s * 1000:,.1f} ms"
    return f"{rate.tokens_per_s:,.0f}", step


def _links(state: ClusterState, rates: ClusterRates) -> Table:
    table = _table("Links, the busiest first", "from", "to", "transport")
    for column in ("both ways", "dispatches/s", "tokens/s"):
        table.add_column(column, justify="right")
    all_rates = rates.links()
    for rate in all_rates[:MAX_ROWS]:
        moved = f"{_scaled(rate.bytes_per_s)}/s"
        link, counts = rate.link, (rate.dispatches_per_s, rate.tokens_per_s)
        table.add_row(
            link.source, link.target, link.transport, moved, *(f"{each:,.0f}" for each in counts)
        )
    table.caption = _more(len(all_rates)) or None
    return table


def _experts(state: ClusterState) -> RenderableType:
    load = state.expert_load
    if load is None or not any(map(any, load.tokens)):
        return Text("Expert load: no tokens yet", style="dim")
    table = _table("Hottest experts: id × layer's mean", "layer")
    for rank in range(HOTTEST):
        table.add_column(f"{rank + 1}.", justify="right")
    rows = sorted(
        zip(load.layer_ids, load.tokens, strict=True), key=lambda row: -_imbalance(row[1])
    )
    for layer_id, tokens in sorted(rows[:MAX_ROWS]):
        table.add_row(str(layer_id), *_hottest(tokens))
    left = _more(len(rows))
    table.caption = f"the least even layers{left}" if left else None
    return table


def _imbalance(tokens: tuple[int, ...]) -> float:
    return max(tokens) * len(tokens) / (sum(tokens) or 1)


def _hottest(tokens: tuple[int, ...]) -> Iterator[str]:
    mean = sum(tokens) / len(tokens)
    for expert in heapq.nlargest(HOTTEST, range(len(tokens)), key=tokens.__getitem__):
        ratio = tokens[expert] / mean if mean else 0.0
        colour = "red" if ratio >= 3 else "yellow" if ratio >= 2 else "default"
        yield f"{expert} [{colour}]×{ratio:.1f}[/]"


def _table(title: str, *columns: str) -> Table:
    return Table(
        *columns, title=title, title_justify="left", title_style="bold", caption_justify="left"
    )


def _more(number: int) -> str:
    return f" and {number - MAX_ROWS} more" if number > MAX_ROWS else ""


def _scaled(value: float) -> str:
    for unit in _UNITS:
        if value < 1000 or unit == _UNITS[-1]:
            break
        value /= 1000
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
