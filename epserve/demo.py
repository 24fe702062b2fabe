"""`epserve demo`: the bundled model on both tiers of this machine, and what happened.

Runs the same prompt on the same processes twice, with expert parallelism at Level 1 and at
Level 2, and compares what was counted with what the formulas say. Knows the launcher and the
client; demo_report.py knows the figures.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path

from rich.console import Console

from epserve.client import EpserveClient
from epserve.cluster_settings import ClusterSettings
from epserve.demo_report import (
    BYTES_PER_VALUE,
    LevelResult,
    comparison_table,
    kv_bytes_per_token,
    links_between,
)
from epserve.generate_messages import Sampling
from epserve.launch_plan import LaunchPlan, make_plan
from epserve.layout import LEVELS, layout_table
from epserve.local_cluster import LocalCluster, running_cluster
from epserve.status import links
from epserve.stop_signals import run_until_signalled
from moe_core.cluster import ClusterState, LinkStats, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import EpserveError, UnavailableError

PROMPT = "If the argument is"
SAMPLING = Sampling(max_tokens=96, temperature=0.6, top_p=0.9, seed=5, ignore_eos=True)
WARM_UP = Sampling(max_tokens=8, ignore_eos=True)
BATCH_SIZE = 16
EXPERT_PROCESSES = 4
READY_TIMEOUT_S = 120.0
STOP_GRACE_S = 10.0
COUNTERS_TIMEOUT_S = 20.0
COUNTERS_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Completion:
    prompt_tokens: int
    token_ids: tuple[int, ...]
    decode_s: float  # from the first token to the last

    @property
    def tokens_per_s(self) -> float:
        return (len(self.token_ids) - 1) / self.decode_s


def demo() -> None:
    """Print the demonstration. Raises EpserveError when something does not come up."""
    console = Console(highlight=False)
    with as_file(files("epserve") / "tiny_model") as model:
        if asyncio.run(run_until_signalled(_demo(console, model))):
            raise EpserveError("interrupted")


async def _demo(console: Console, model: Path) -> None:
    first = _plan(model, degree=1)
    _introduce(console, first)
    results = [
        await _run_level(console, first, show_text=True),
        await _run_level(console, _plan(model, degree=2), show_text=False),
    ]
    _report(console, first, results)


def _plan(model: Path, degree: int) -> LaunchPlan:
    parallel = ParallelConfig(
        expert_devices=EXPERT_PROCESSES,
        ep_size=EXPERT_PROCESSES,
        expert_parallel_degree=degree,
    )
    return make_plan(ClusterSettings(model=model, parallel=parallel, device="cpu"))


def _introduce(console: Console, plan: LaunchPlan) -> None:
    model = plan.model
    console.print("[bold]epserve: one model, its two halves in different processes[/]\n")
    console.print(
        f"The bundled model has {model.num_hidden_layers} layers. Each layer's attention runs in "
        f"one process, which keeps the KV cache; its {model.moe.num_experts} experts are spread "
        f"over {EXPERT_PROCESSES} processes that keep nothing. For every token a router picks "
        f"{model.moe.num_experts_per_tok} experts; the token's {model.hidden_size} values are "
        "dispatched to them, and their weighted sums are combined.\n"
    )
    console.print(
        "It is tiny and learned from Python's documentation: expect its tone, not its sense.\n"
    )
    console.print(layout_table(plan.places))
    console.print()


async def _run_level(console: Console, plan: LaunchPlan, *, show_text: bool) -> LevelResult:
    started = time.monotonic()
    async with AsyncExitStack() as stack:
        with console.status(f"starting {len(plan.places)} processes"):
            cluster = await stack.enter_async_context(
                running_cluster(
                    plan,
                    sink=lambda _name, _line: None,
                    progress=lambda _words: None,
                    grace_s=STOP_GRACE_S,
                    ready_timeout_s=READY_TIMEOUT_S,
                )
            )
        seconds = time.monotonic() - started
        console.print(
            f"[bold]{LEVELS[plan.parallel.degree]}[/]: "
            f"{len(plan.places)} processes ready after {seconds:.1f} s"
        )
        return await cluster.guard(_measure(console, cluster, show_text))


async def _measure(console: Console, cluster: LocalCluster, show_text: bool) -> LevelResult:
    client, parallel = cluster.client, cluster.plan.parallel
    await _complete(client, WARM_UP)  # the first transfer to each peer sets up its connection
    before = await _counted_links(client)
    if show_text:
        console.print(f"\n[bold]{PROMPT}[/]", end="")
    completion = await _complete(
        client, SAMPLING, lambda text: console.out(text, end="") if show_text else None
    )
    if show_text:
        console.print("\n")
    after = await _counted_links(client, before)
    started = time.monotonic()
    batch = [_complete(client, replace(SAMPLING, seed=seed)) for seed in range(BATCH_SIZE)]
    batch_tokens = sum(len(done.token_ids) for done in await asyncio.gather(*batch))
    return LevelResult(
        parallel=parallel,
        token_ids=completion.token_ids,
        num_tokens=completion.prompt_tokens + len(completion.token_ids) - 1,
        tokens_per_s=completion.tokens_per_s,
        batch_size=BATCH_SIZE,
        batch_tokens_per_s=batch_tokens / (time.monotonic() - started),
        links=links_between(before, after),
    )


async def _complete(
    client: EpserveClient, sampling: Sampling, show: Callable[[str], None] = lambda _: None
) -> Completion:
    token_ids: list[int] = []
    prompt_tokens = 0
    first = last = 0.0
    async for output in client.generate(PROMPT, sampling):
        last = time.monotonic()
        first = first or last
        token_ids += output.token_ids
        show(output.text)
        if output.usage is not None:
            prompt_tokens = output.usage.prompt_tokens
    return Completion(prompt_tokens, tuple(token_ids), last - first)


async def _counted_links(
    client: EpserveClient, before: Sequence[LinkStats] = ()
) -> tuple[LinkStats, ...]:
    """The links' counters once the work that came after `before` is all in them.

    An attention process reports its load and its counters together, from time to time: a report
    of an idle process whose counters have grown is complete. Raises UnavailableError when there
    is none in COUNTERS_TIMEOUT_S seconds.
    """
    try:
        async with asyncio.timeout(COUNTERS_TIMEOUT_S):
            while True:
                state = await client.cluster()
                counted = tuple(links(state))
                if _is_idle(state) and _dispatches(counted) > _dispatches(before):
                    return counted
                await asyncio.sleep(COUNTERS_POLL_S)
    except TimeoutError:
        raise UnavailableError(
            f"{client.target} reported no new link counters in {COUNTERS_TIMEOUT_S:g} s"
        ) from None


def _is_idle(state: ClusterState) -> bool:
    loads = [member.attention_load for member in state.tier(Role.ATTN)]
    return all(load and not load.num_running and not load.num_waiting for load in loads)


def _dispatches(counted: Sequence[LinkStats]) -> int:
    return sum(link.dispatches for link in counted)


def _report(console: Console, plan: LaunchPlan, results: Sequence[LevelResult]) -> None:
    model = plan.model
    layers = len(model.moe_layer_ids)
    console.print(
        f"\n[bold]What crossed between the tiers[/] for the {results[0].num_tokens} tokens of that "
        f"text, in each of the {layers} layers with experts\n"
    )
    console.print(comparison_table(results, model))
    value_bytes = BYTES_PER_VALUE[model.dtype]
    console.print(
        f"\nThe formula: tokens × processes that a token goes to × {model.hidden_size} values × "
        f"{value_bytes} bytes. Level 1 sends every token to everybody; Level 2 sends it once to "
        "each process that holds one of its experts."
    )
    same = results[0].token_ids == results[1].token_ids
    agreement = "the same tokens" if same else "other tokens (sums were added in another order)"
    console.print(f"Both levels generated {agreement}.")
    latent, per_head = (kv_bytes_per_token(model, mla) for mla in (True, False))
    console.print(
        f"\n[bold]KV cache per token[/]: {latent:,} bytes with MLA, {per_head:,} without "
        f"({per_head / latent:.1f} times as much)\n"
    )
    console.print("Next: epserve serve --model DIR, then epserve generate and epserve status")
