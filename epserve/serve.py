"""`epserve serve`: a whole cluster on this machine until it is told to stop.

Knows what to print and when; how processes live, die and are started again is the business of
supervisor.py and upkeep.py.
"""

import asyncio
import shlex

from rich.console import Console
from rich.markup import escape

from epserve.cluster_settings import ClusterSettings
from epserve.launch_plan import LaunchPlan, make_plan
from epserve.layout import describe, layout_table
from epserve.local_cluster import running_cluster
from epserve.stop_signals import run_until_signalled
from epserve.supervisor import LineSink

# Beyond a service's own drain, which ends by itself: killing is for those that hang.
STOP_MARGIN_S = 5.0
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
        out.print(
            f"stopping: running requests get {plan.settings.drain_timeout_s:g} s to end; "
            "Ctrl-C again stops at once",
            soft_wrap=True,
        )

    if await run_until_signalled(_stay_up(plan, out, err), stopping):
        out.print("stopped")


async def _stay_up(plan: LaunchPlan, out: Console, err: Console) -> None:
    def progress(waiting_for: str) -> None:
        out.print(f"waiting for: {escape(waiting_for)}", soft_wrap=True)

    sink = plain_lines(err) if plan.settings.log_json else prefixed_lines(err)

    def note(words: str) -> None:
        out.print(escape(words), soft_wrap=True)

    grace_s = plan.settings.drain_timeout_s + STOP_MARGIN_S
    async with running_cluster(plan, sink, progress, grace_s=grace_s) as cluster:
        models = await cluster.client.list_models()
        prompt = "--prompt 'Once'" if models[0].has_tokenizer else "--prompt-ids 1,2,3"
        out.print(
            f"[bold green]ready[/]: serving {models[0].id} at {plan.target} (gRPC) "
            f"and {plan.http_url} (HTTP)",
            soft_wrap=True,
        )
        options = _client_options(plan.settings)
        command = f"epserve generate --target {plan.target}{options} {prompt}"
        out.print(f"try: {escape(command)}", soft_wrap=True)
        await cluster.keep_up(note)


def _client_options(settings: ClusterSettings) -> str:
    """What a client of this cluster must add."""
    tls = "" if settings.tls is None else f" --tls-ca {shlex.quote(str(settings.tls.ca))}"
    return tls + ("" if settings.api_keys is None else " --api-key KEY")


def plain_lines(console: Console) -> LineSink:
    """Prints each line as it came: a JSON line says itself who wrote it."""

    def print_line(name: str, line: str) -> None:
        console.out(line, highlight=False)

    return print_line


def prefixed_lines(console: Console) -> LineSink:
    """Prints each line behind the name of the process that it came from."""
    colour_of: dict[str, str] = {}

    def print_line(name: str, line: str) -> None:
        colour = colour_of.setdefault(name, _COLOURS[len(colour_of) % len(_COLOURS)])
        console.print(f"[{colour}]{name:>9}[/] {escape(line)}", soft_wrap=True)

    return print_line
