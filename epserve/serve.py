"""`epserve serve`: a whole cluster on this machine until it is told to stop.

Knows what to print and when; how processes live and die is the supervisor's business.
"""

import asyncio

from rich.console import Console
from rich.markup import escape

from epserve.launch_plan import ClusterSettings, LaunchPlan, make_plan
from epserve.layout import describe, layout_table
from epserve.local_cluster import running_cluster
from epserve.stop_signals import run_until_signalled
from epserve.supervisor import LineSink

# Longer than a service's own drain, which ends by itself: killing is for those that hang.
STOP_GRACE_S = 35.0
_COLOURS = ("cyan", "green", "yellow", "magenta", "blue")


def serve(settings: ClusterSettings) -> None:
    """Check, print the layout, start everything, stay until stopped. Raises EpserveError."""
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    plan = make_plan(settings)
    out.print(f"[bold]{describe(plan.parallel, plan.model)}[/]", soft_wrap=True)
    out.print(layout_table(plan.places))
    asyncio.run(_serve(plan, out, err))


async def _serve(plan: LaunchPlan, out: Console, err: Console) -> None:
    def stopping() -> None:
        out.print("stopping; Ctrl-C again stops at once")

    if await run_until_signalled(_stay_up(plan, out, err), stopping):
        out.print("stopped")


async def _stay_up(plan: LaunchPlan, out: Console, err: Console) -> None:
    def progress(waiting_for: str) -> None:
        out.print(f"waiting for: {escape(waiting_for)}", soft_wrap=True)

    sink = prefixed_lines(err)
    async with running_cluster(plan, sink, progress, grace_s=STOP_GRACE_S) as cluster:
        models = await cluster.client.list_models()
        prompt = "--prompt 'Once'" if models[0].has_tokenizer else "--prompt-ids 1,2,3"
        out.print(
            f"[bold green]ready[/]: serving {models[0].id} at {plan.target} (gRPC) "
            f"and {plan.http_url} (HTTP)",
            soft_wrap=True,
        )
        out.print(f"try: epserve generate --target {plan.target} {prompt}", soft_wrap=True)
        await cluster.guard(asyncio.Event().wait())


def prefixed_lines(console: Console) -> LineSink:
    """Prints each line behind the name of the process that it came from."""
    colour_of: dict[str, str] = {}

    def print_line(name: str, line: str) -> None:
        colour = colour_of.setdefault(name, _COLOURS[len(colour_of) % len(_COLOURS)])
        console.print(f"[{colour}]{name:>9}[/] {escape(line)}", soft_wrap=True)

    return print_line
